"""Encoded prompts, and the protocols of what encodes prompts and images."""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Protocol

import torch

if TYPE_CHECKING:
    from typing_extensions import Self


class Conditioning(ABC):
    """A batch of encoded prompts. Its denoiser knows what is in it; the rest of the trainer only cuts and joins it."""

    @property
    @abstractmethod
    def tokens(self) -> int:
        """Tokens of each prompt, padding included: the longest, if they differ."""

    @property
    @abstractmethod
    def tensors(self) -> tuple[torch.Tensor, ...]:
        """Everything that is encoded."""

    @abstractmethod
    def rows(self, first: int, last: int) -> Self:
        """Prompts ``first .. last`` (exclusive) of the batch."""

    @abstractmethod
    def to(self, device: torch.device) -> Self:
        """The same prompts on ``device``."""

    @abstractmethod
    def joined(self, others: Sequence[Self]) -> Self:
        """One batch of these prompts and those of ``others``."""

    @property
    def first(self) -> Self:
        """The first prompt only, padded as in the batch."""
        return self.rows(0, 1)


@dataclass(frozen=True)
class EncodedText(Conditioning):
    """Prompts for cross-attention.

    Attributes:
        hidden_states: float32 [b, tokens, context_dim]; tokens is 77 for each chunk of a prompt.
        pooled: float32 [b, d], for families whose UNet also takes a pooled prompt; None for the others.
    """

    hidden_states: torch.Tensor
    pooled: torch.Tensor | None = None

    @property
    def tokens(self) -> int:
        """See :class:`Conditioning`."""
        return self.hidden_states.shape[1]

    @property
    def tensors(self) -> tuple[torch.Tensor, ...]:
        """See :class:`Conditioning`."""
        return (self.hidden_states,) if self.pooled is None else (self.hidden_states, self.pooled)

    def rows(self, first: int, last: int) -> EncodedText:
        """See :class:`Conditioning`."""
        pooled = None if self.pooled is None else self.pooled[first:last]
        return EncodedText(self.hidden_states[first:last], pooled)

    def to(self, device: torch.device) -> EncodedText:
        """See :class:`Conditioning`."""
        pooled = None if self.pooled is None else self.pooled.to(device)
        return EncodedText(self.hidden_states.to(device), pooled)

    def joined(self, others: Sequence[EncodedText]) -> EncodedText:
        """One batch; shorter prompts are repeated to a common length.

        Repeating all keys and values of a cross-attention equally often does not change its softmax average, so a
        repeated prompt is equivalent to the original (ComfyUI batches prompts the same way).
        """
        parts = [self, *others]
        length = math.lcm(*(part.tokens for part in parts))
        hidden_states = torch.cat([part.hidden_states.repeat(1, length // part.tokens, 1) for part in parts])
        pooled = [part.pooled for part in parts if part.pooled is not None]
        return EncodedText(hidden_states, torch.cat(pooled) if pooled else None)


def concatenate(parts: Sequence[Conditioning]) -> Conditioning:
    """One batch of all prompts, which are of one kind."""
    return parts[0].joined(parts[1:])


def encoded_text(conditioning: Conditioning) -> EncodedText:
    """The same, for a denoiser that takes nothing else."""
    assert isinstance(conditioning, EncodedText), conditioning
    return conditioning


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


AT_ONCE = 4
"""Pictures that are encoded or decoded in one batch: more are no faster, and their activations take gigabytes."""


def in_parts(pictures: torch.Tensor, most: int = AT_ONCE) -> list[torch.Tensor]:
    """Views of a batch in parts of at most ``most`` pictures, or one more: a single picture is never left over, because
    convolutions of a single picture round differently on a CPU. So the result is that of one batch.

    Args:
        pictures: [n, ...].
    """
    count = len(pictures)
    sizes = [most] * (count // most) + ([count % most] if count % most else [])
    if len(sizes) > 1 and sizes[-1] == 1:
        sizes[-2:] = [most + 1]
    return list(pictures.split(sizes)) if sizes else [pictures]
