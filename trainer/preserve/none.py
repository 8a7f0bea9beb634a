"""No class preservation: the fastest method, for when the model may forget the class."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import ClassVar

import torch

from ..machine.draws import Draws
from .preservation import AdapterLayer, BaseIdentity, Part


class NoPreservation:
    """Adds no loss, costs nothing and needs nothing."""

    name: ClassVar[str] = "none"
    losses: ClassVar[Mapping[str, str]] = {}
    key: str | None = None
    prompts: tuple[str, ...] = ()
    record: Mapping[str, str] = {"class_images": ""}
    metadata: Mapping[str, str] = {"ss_num_reg_images": "0"}

    def check(self, size: tuple[int, ...], base: BaseIdentity) -> tuple[str, ...]:
        """Never fails."""
        return ()

    def pictures(self, photos: int) -> int:
        """No images."""
        return 0

    def parts(self, photos: Part, draws: Draws, weight: float) -> Sequence[Part]:
        """No images."""
        return ()

    def penalty(self, layers: Iterator[AdapterLayer], weight: float) -> Mapping[str, torch.Tensor]:
        """No terms."""
        return {}
