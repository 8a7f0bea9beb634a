"""No class preservation: the fastest method, for when the model may forget the class.

Costs nothing and needs nothing.
"""

from __future__ import annotations

from typing import ClassVar

from .preservation import Preservation
from .priors import ClassPriors


class NoPreservation(Preservation):
    """Adds no loss."""

    name: ClassVar[str] = "none"
    key: str | None = None

    @classmethod
    def create(cls, class_word: str, priors: ClassPriors | None) -> NoPreservation:
        """Ignores class images."""
        return cls()
