"""Encoded prompts, as the UNet takes them."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Protocol

import torch


@dataclass(frozen=True)
class Conditioning:
    """Encoded prompts.

    Attributes:
        hidden_states: float32 [b, tokens, context_dim]; tokens is 77 for each chunk of a prompt.
        pooled: float32 [b, d], for families whose UNet takes a pooled prompt besides; None for the others.
    """

    hidden_states: torch.Tensor
    pooled: torch.Tensor | None = None

    @property
    def first(self) -> Conditioning:
        """The first prompt alone, in the length that it has in the batch."""
        return self.rows(0, 1)

    def rows(self, first: int, last: int) -> Conditioning:
        """Prompts ``first .. last`` (exclusive) of the batch."""
        pooled = None if self.pooled is None else self.pooled[first:last]
        return Conditioning(self.hidden_states[first:last], pooled)

    def to(self, device: torch.device) -> Conditioning:
        """The same prompts on ``device``."""
        pooled = None if self.pooled is None else self.pooled.to(device)
        return Conditioning(self.hidden_states.to(device), pooled)


class PromptEncoder(Protocol):
    """Turns prompts into conditioning; ComfyUI's CLIP inside a graph, transformers from a shell."""

    def encode(self, prompts: Sequence[str]) -> list[Conditioning]:
        """One conditioning of batch size 1 for each prompt, as normal tensors on the CPU."""
        ...


class LatentCodec(Protocol):
    """Turns pictures into latents and back; ComfyUI's VAE inside a graph, diffusers from a shell."""

    def encode(self, images: torch.Tensor) -> torch.Tensor:
        """[n, 3, h, w] in 0..1 -> the posterior's mean, scaled for the UNet, float32 [n, 4, h/8, w/8] on the CPU."""
        ...

    def decode(self, latents: torch.Tensor) -> torch.Tensor:
        """Scaled latents [n, 4, h/8, w/8] -> float32 [n, 3, h, w] in 0..1 on the CPU."""
        ...


def concatenate(parts: Sequence[Conditioning]) -> Conditioning:
    """One batch from several; prompts of fewer chunks are repeated to the length of the longest.

    Repeating every key and value of a cross-attention the same number of times leaves its softmax average as it
    was, so a repeated prompt means exactly what the single one did (ComfyUI batches prompts the same way).
    """
    length = math.lcm(*(part.hidden_states.shape[1] for part in parts))
    hidden_states = torch.cat(
        [part.hidden_states.repeat(1, length // part.hidden_states.shape[1], 1) for part in parts]
    )
    pooled = [part.pooled for part in parts if part.pooled is not None]
    return Conditioning(hidden_states, torch.cat(pooled) if pooled else None)
