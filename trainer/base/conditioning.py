"""Encoded prompts, and the protocols of what encodes prompts and images."""

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
        pooled: float32 [b, d], for families whose UNet also takes a pooled prompt; None for the others.
    """

    hidden_states: torch.Tensor
    pooled: torch.Tensor | None = None

    @property
    def first(self) -> Conditioning:
        """The first prompt only, padded as in the batch."""
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
    """Encodes prompts: with ComfyUI's CLIP in a graph, with transformers from a shell."""

    def encode(self, prompts: Sequence[str]) -> list[Conditioning]:
        """One conditioning of batch size 1 for each prompt, as CPU tensors that autograd accepts."""
        ...


class LatentCodec(Protocol):
    """Encodes and decodes images: with ComfyUI's VAE in a graph, with diffusers from a shell."""

    def encode(self, images: torch.Tensor) -> torch.Tensor:
        """[n, 3, h, w] in 0..1 -> the posterior's mean, scaled for the UNet, float32 [n, 4, h/8, w/8] on the CPU."""
        ...

    def decode(self, latents: torch.Tensor) -> torch.Tensor:
        """Scaled latents [n, 4, h/8, w/8] -> float32 [n, 3, h, w] in 0..1 on the CPU."""
        ...


def concatenate(parts: Sequence[Conditioning]) -> Conditioning:
    """Concatenate to one batch; shorter prompts are repeated to a common length.

    Repeating all keys and values of a cross-attention equally often does not change its softmax average, so a
    repeated prompt is equivalent to the original (ComfyUI batches prompts the same way).
    """
    length = math.lcm(*(part.hidden_states.shape[1] for part in parts))
    hidden_states = torch.cat(
        [part.hidden_states.repeat(1, length // part.hidden_states.shape[1], 1) for part in parts]
    )
    pooled = [part.pooled for part in parts if part.pooled is not None]
    return Conditioning(hidden_states, torch.cat(pooled) if pooled else None)
