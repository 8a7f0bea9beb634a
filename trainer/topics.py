"""What a message can be about, so that each front end can say where that is set.

The trainer only says "text encoder". A graph adds that this is the input CLIP (``nodes/graph_terms.py``), a shell that
it comes from ``--base`` (:mod:`trainer.shell.terms`).
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from enum import Enum


class Topic(Enum):
    """Its value is the trainer's own word for it."""

    UNET = "UNet"
    TEXT_ENCODER = "text encoder"
    VAE = "VAE"
    CLASS_IMAGES = "class images"
    NO_CLASS_IMAGES = "preservation"
    CLASS_IMAGE_MODEL = "model of the class images"
    MASK = "mask"
    CROP = "crop"
    OUTPUT_FOLDER = "output folder"
    RUN_IN_PROGRESS = "run in progress"
    LORA_FORMAT = "LoRA format"
    PACKAGE = "Python package"
    TORCH = "PyTorch"


@dataclass(frozen=True)
class Term:
    """What a front end knows about a topic.

    Attributes:
        where: the input or option that sets it; empty to keep the trainer's word.
        advice: what else to do there, as an imperative that starts with a capital letter; may be empty.
    """

    where: str = ""
    advice: str = ""


Terms = Mapping[Topic, Term]


class Note(str):
    """A warning about a topic: a sentence that front ends may extend by :func:`note_in_terms`."""

    about: Topic

    def __new__(cls, sentence: str, about: Topic) -> Note:
        note = super().__new__(cls, sentence)
        note.about = about
        return note

    def __getnewargs__(self) -> tuple[str, Topic]:  # type: ignore[override]
        return str(self), self.about  # copy passes it to __new__


def note_in_terms(note: str, terms: Terms) -> str:
    """The warning with the front end's advice, if it has any."""
    advice = terms[note.about].advice if isinstance(note, Note) and note.about in terms else ""
    return f"{ended(note)} {ended(advice)}" if advice else str(note)


def ended(text: str) -> str:
    """The text with a full stop, unless it ends in one already."""
    return text if text.endswith((".", "!", "?")) else f"{text}."
