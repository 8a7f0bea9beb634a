"""Stateless random numbers: each draw is a function of the seed, a purpose and a counter.

There is no random state to save, and a resumed run draws the same numbers as an uninterrupted one. Everything is drawn
on the CPU, so that all devices get the same numbers.
"""

from __future__ import annotations

import hashlib
from dataclasses import dataclass

import torch

GOLDEN_RATIO_CONJUGATE = (5**0.5 - 1) / 2


def derived_seed(seed: int, purpose: str, number: int) -> int:
    """A seed for one purpose and one step: 63 bits of SHA-256, so that seeds are unrelated."""
    return int.from_bytes(hashlib.sha256(f"{seed}/{purpose}/{number}".encode()).digest()[:8], "big") >> 1


def generator_for(seed: int, purpose: str, number: int) -> torch.Generator:
    """A CPU generator for one purpose and one step."""
    return torch.Generator("cpu").manual_seed(derived_seed(seed, purpose, number))


def shuffled_indices(first: int, count: int, size: int, seed: int, purpose: str) -> list[int]:
    """Items ``first .. first+count`` of an endless sequence: ``range(size)``, reshuffled every epoch."""
    shuffles: dict[int, list[int]] = {}
    indices = []
    for position in range(first, first + count):
        epoch, offset = divmod(position, size)
        if epoch not in shuffles:
            shuffles[epoch] = torch.randperm(size, generator=generator_for(seed, purpose, epoch)).tolist()
        indices.append(shuffles[epoch][offset])
    return indices


def low_discrepancy(first: int, count: int, seed: int, purpose: str) -> torch.Tensor:
    """Items ``first .. first+count`` of an endless low-discrepancy sequence in 0..1, float64 [count].

    A Kronecker sequence: a start chosen by the seed, then steps of the golden ratio, modulo 1. Each value is uniformly
    distributed, but any stretch of the sequence covers 0..1 evenly. Most of the variance of a training step comes from
    its timesteps, so this keeps a small batch, or the few steps that the optimizer averages over, from having only
    noisy or only clean images. (Within one batch: arXiv 2107.00630.)
    """
    start = torch.rand((), generator=generator_for(seed, purpose, 0), dtype=torch.float64)
    return (start + GOLDEN_RATIO_CONJUGATE * torch.arange(first, first + count, dtype=torch.float64)) % 1.0


@dataclass(frozen=True)
class Draws:
    """The random numbers of one micro-step.

    Attributes:
        seed: the run's seed.
        micro_step: number of batches drawn before, over the whole run.
        batch_size: images per batch.
        first: number of images drawn before, over the whole run.
    """

    seed: int
    micro_step: int
    batch_size: int
    first: int

    @property
    def numbers(self) -> list[int]:
        """The numbers of the images, over the whole run."""
        return list(range(self.first, self.first + self.batch_size))

    def shuffled(self, size: int, purpose: str) -> list[int]:
        """The next batch of :func:`shuffled_indices`."""
        return shuffled_indices(self.first, self.batch_size, size, self.seed, purpose)

    def uniform(self, purpose: str) -> torch.Tensor:
        """Values in 0..1, float64 [batch]; see :func:`low_discrepancy`."""
        return low_discrepancy(self.first, self.batch_size, self.seed, purpose)

    def bernoulli(self, probability: float, purpose: str) -> torch.Tensor:
        """bool [batch]: for each image, True with this probability."""
        random = generator_for(self.seed, purpose, self.micro_step)
        return torch.rand(self.batch_size, generator=random) < probability

    def noise(self, sizes: list[tuple[int, ...]], offset: float) -> list[torch.Tensor]:
        """Standard normal noise [batch, *size] for each size; one draw if all sizes are equal.

        Args:
            sizes: (channels, height, width) of each part of the batch.
            offset: scale of the noise added to each whole channel of an image (noise offset); 0 for none.
        """
        random = generator_for(self.seed, "noise", self.micro_step)
        if len(set(sizes)) == 1:
            noise = list(torch.randn((len(sizes), self.batch_size, *sizes[0]), generator=random))
        else:
            noise = [torch.randn((self.batch_size, *size), generator=random) for size in sizes]
        if offset and sizes:
            # Drawn last, so that the other noise is the same with and without an offset.
            shape = (len(sizes), self.batch_size, sizes[0][0], 1, 1)
            shifts = offset * torch.randn(shape, generator=random)
            noise = [part + shift for part, shift in zip(noise, shifts, strict=True)]
        return noise
