"""The registry of class preservation methods."""

from __future__ import annotations

from .class_images import ClassImages
from .none import NoPreservation
from .preservation import Preservation
from .priors import ClassPriors

WAYS: dict[str, type[Preservation]] = {way.name: way for way in (NoPreservation, ClassImages)}
"""By the name that users choose them by."""


def keeping_class(priors: ClassPriors | None) -> Preservation:
    """The method to use: class images if there are any, otherwise none."""
    return NoPreservation() if priors is None else ClassImages(priors)


def loss_labels() -> dict[str, str]:
    """The labels of the panel's curves, by the loss term's name."""
    return {"instance_loss": "subject"} | {name: label for way in WAYS.values() for name, label in way.losses.items()}
