"""Class images as training takes them."""

from __future__ import annotations

from dataclasses import dataclass

import torch


@dataclass(frozen=True)
class ClassPriors:
    """Pictures of the class, made by the base itself, that keep it from forgetting what the class looks like.

    Attributes:
        latents: float32 [n, 4, h/8, w/8], on the CPU, in the training space.
        prompt: the class prompt they were made with.
        hashes: one content hash a picture.
        digest: SHA-256 over latents and prompt.
    """

    latents: torch.Tensor
    prompt: str
    hashes: tuple[str, ...]
    digest: str
