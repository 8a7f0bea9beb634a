"""Which inputs of a graph the trainer's messages are about: it says "text encoder" where a graph has CLIP."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import replace

from ..trainer.errors import SubjectBoothError
from ..trainer.events import Event, Started
from ..trainer.topics import Term, Terms, Topic, note_in_terms

TERMS: Terms = {
    Topic.UNET: Term("MODEL", "Connect another MODEL"),
    Topic.TEXT_ENCODER: Term(
        "CLIP",
        "Connect another CLIP, or start ComfyUI with --fp32-text-enc; a damaged embedding: in a prompt is another "
        "usual cause",
    ),
    Topic.VAE: Term("VAE", "Connect another VAE, or start ComfyUI with --fp32-vae"),
    Topic.CLASS_IMAGES: Term("class_priors"),
    Topic.NO_CLASS_IMAGES: Term(
        "preservation",
        "Connect Generate Class Priors to class_priors, or set preservation to curvature, which needs none",
    ),
    Topic.CLASS_IMAGE_MODEL: Term(
        "class_priors", "Connect the same MODEL and CLIP to Generate Class Priors and to the trainer"
    ),
    Topic.MASK: Term(advice="Or connect photos and their MASK to Load Subject Images"),
    Topic.CROP: Term(advice="Load Subject Images has the input crop"),
    Topic.OUTPUT_FOLDER: Term(advice="To use another one, start ComfyUI with --output-directory"),
    Topic.RUN_IN_PROGRESS: Term(advice="The other process is another ComfyUI, or a training from a shell"),
    Topic.LORA_FORMAT: Term(advice="ComfyUI's own LoRA loader may be able to load it"),
    Topic.PACKAGE: Term(advice="Use ComfyUI's own Python for it, and restart ComfyUI afterwards"),
    Topic.TORCH: Term(advice="ComfyUI brings it: update ComfyUI (a newer portable version, or its requirements.txt)"),
}


@contextmanager
def graph_messages() -> Iterator[None]:
    """Around a node's ``execute``: the trainer's errors get the graph's terms.

    Raises:
        SubjectBoothError: in place of the trainer's.
    """
    try:
        yield
    except SubjectBoothError as error:
        translated = error.in_terms(TERMS)
        if translated is error:  # which must not become its own cause
            raise
        raise translated from error


def error_in_graph(error: SubjectBoothError) -> str:
    """The message of an error that does not end a node, such as one of ``validate_inputs``."""
    return str(error.in_terms(TERMS))


def notes_in_graph(notes: Sequence[str]) -> tuple[str, ...]:
    """Warnings of the trainer, as a node shows them."""
    return tuple(note_in_terms(note, TERMS) for note in notes)


def event_in_graph(event: Event) -> Event:
    """An event of a run, as a node shows it."""
    return replace(event, notes=notes_in_graph(event.notes)) if isinstance(event, Started) else event
