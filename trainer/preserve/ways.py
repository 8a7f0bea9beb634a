"""All ways to keep the class."""

from __future__ import annotations

from .class_images import ClassImages
from .none import NoPreservation
from .preservation import Preservation
from .priors import ClassPriors

WAYS: dict[str, type[Preservation]] = {way.name: way for way in (NoPreservation, ClassImages)}
"""By the name a user chooses it by."""


def keeping_class(priors: ClassPriors | None) -> Preservation:
    """The way that a graph or a command asks for: with class images where there are some, else none."""
    return NoPreservation() if priors is None else ClassImages(priors)


def loss_labels() -> dict[str, str]:
    """What the panel calls the curve of each term of the loss, by the term's name."""
    return {"instance_loss": "subject"} | {name: label for way in WAYS.values() for name, label in way.losses.items()}
