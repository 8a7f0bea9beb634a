"""Embeddings of images, by which pictures are compared."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Protocol, runtime_checkable

import torch

from ..machine.numerics import CPU


class Embedder(Protocol):
    """Maps images to vectors, so that images with the same content are near each other.

    Attributes:
        name: shown with the figures, since only figures of the same embedder can be compared.
    """

    @property
    def name(self) -> str: ...

    def embed(self, images: torch.Tensor) -> torch.Tensor:
        """Embed images of any size.

        Args:
            images: float32 [n, 3, h, w] in 0..1.

        Returns:
            unit vectors, float32 [n, d], on the CPU.
        """
        ...


@runtime_checkable
class Namer(Protocol):
    """An embedder that can also tell what an image shows."""

    def names(self, images: torch.Tensor, choices: Sequence[str]) -> list[str]:
        """The choice that fits each image best, or an empty string if none does.

        Args:
            images: float32 [n, 3, h, w] in 0..1.
            choices: prompts, such as "a photo of a dog".
        """
        ...


def from_folder(folder: Path, device: torch.device = CPU) -> Embedder:
    """Load CLIP, DINOv2 or DINO from a local folder as saved by transformers: ``config.json`` and safetensors.

    Nothing is downloaded. CLIP with its text encoder is also a :class:`Namer`; a vision tower alone is not.

    Args:
        folder: the folder.
        device: where the model runs.

    Raises:
        SubjectBoothError: the folder is missing, incomplete, damaged, or contains another kind of model.
    """
    raise NotImplementedError
