"""The LoRA of one layer, as class preservation sees it."""

from __future__ import annotations

from dataclasses import dataclass

import torch


@dataclass(frozen=True)
class AdapterLayer:
    """The LoRA of one layer, which adds ``scale * up @ down`` to its weight.

    Attributes:
        down: float32 [rank, in], for a convolution [rank, in, 1, 1].
        up: float32 [out, rank], for a convolution [out, rank, 1, 1].
        scale: ``alpha / rank``.
    """

    down: torch.Tensor
    up: torch.Tensor
    scale: float
