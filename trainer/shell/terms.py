"""Which command-line options the trainer's messages are about."""

from __future__ import annotations

from ..errors import SubjectBoothError
from ..topics import Term, Terms, Topic, note_in_terms

TERMS: Terms = {
    Topic.UNET: Term("--base"),
    Topic.TEXT_ENCODER: Term("--base"),
    Topic.VAE: Term("--base"),
    Topic.CLASS_IMAGES: Term("--num_class_images"),
    Topic.NO_CLASS_IMAGES: Term(
        "--preservation", "Use --num_class_images 24, or --preservation curvature, which needs none"
    ),
    Topic.CLASS_IMAGE_MODEL: Term("--num_class_images"),
    Topic.MASK: Term(advice="A mask is read from the transparency of a photo"),
    Topic.CROP: Term(advice="The option is --crop"),
    Topic.OUTPUT_FOLDER: Term(advice="The option is --output_dir"),
}


def error_in_shell(error: SubjectBoothError) -> str:
    """Format an error of the trainer for the command line."""
    return str(error.in_terms(TERMS))


def note_in_shell(note: str) -> str:
    """Format a warning of the trainer for the command line."""
    return note_in_terms(note, TERMS)
