"""What is random in a run: each draw is a function of the seed, a purpose and a number.

So there is no random state to save: a resumed run draws what an uninterrupted one would have drawn. All of it is drawn
on the CPU, so that every device sees the same.
"""

from __future__ import annotations

import hashlib
from dataclasses import dataclass

import torch

GOLDEN_SECTION = (5**0.5 - 1) / 2


def derived_seed(seed: int, purpose: str, number: int) -> int:
    """A seed for one purpose and one step: 63 bits of SHA-256, so that no two of them are related."""
    return int.from_bytes(hashlib.sha256(f"{seed}/{purpose}/{number}".encode()).digest()[:8], "big") >> 1


def generator_for(seed: int, purpose: str, number: int) -> torch.Generator:
    """A CPU generator for one purpose and one step."""
    return torch.Generator("cpu").manual_seed(derived_seed(seed, purpose, number))


def order(first: int, count: int, size: int, seed: int, purpose: str) -> list[int]:
    """Items ``first .. first+count`` of an endless sequence of shuffles of ``range(size)``: each is seen as often."""
    shuffles: dict[int, list[int]] = {}
    picked = []
    for position in range(first, first + count):
        epoch, place = divmod(position, size)
        if epoch not in shuffles:
            shuffles[epoch] = torch.randperm(size, generator=generator_for(seed, purpose, epoch)).tolist()
        picked.append(shuffles[epoch][place])
    return picked


def spread_evenly(first: int, count: int, seed: int, purpose: str) -> torch.Tensor:
    """Draws ``first .. first+count`` of an endless sequence that covers 0..1 evenly, float64 [count].

    Every stretch of the sequence is spread as evenly as its length allows: a start that the seed chooses, then steps of
    the golden section, modulo 1 (Kronecker's sequence). Each value is as likely as with independent draws, but the few
    pictures of a small batch, and of the steps that the optimizer averages over, no longer happen to be all noise or
    none: most of a step's randomness is in its timesteps. (Within one batch: arXiv 2107.00630.)
    """
    start = torch.rand((), generator=generator_for(seed, purpose, 0), dtype=torch.float64)
    return (start + GOLDEN_SECTION * torch.arange(first, first + count, dtype=torch.float64)) % 1.0


@dataclass(frozen=True)
class Draws:
    """The draws of one micro-step, of which a process takes its own part.

    Attributes:
        seed: the run's.
        micro_step: batches drawn before, over the whole run.
        whole: pictures a batch, those of all processes together.
        own: which of them are this process's.
    """

    seed: int
    micro_step: int
    whole: int
    own: slice

    @property
    def first(self) -> int:
        """Pictures drawn before, over the whole run."""
        return self.micro_step * self.whole

    def order(self, size: int, purpose: str) -> list[int]:
        """This process's items of the next batch; see :func:`order`."""
        return order(self.first, self.whole, size, self.seed, purpose)[self.own]

    def uniform(self, purpose: str) -> torch.Tensor:
        """This process's values in 0..1, float64 [own]; see :func:`spread_evenly`."""
        return spread_evenly(self.first, self.whole, self.seed, purpose)[self.own]

    def chance(self, share: float, purpose: str) -> torch.Tensor:
        """bool [own]: which of the pictures something happens to that happens to ``share`` of them."""
        random = generator_for(self.seed, purpose, self.micro_step)
        return (torch.rand(self.whole, generator=random) < share)[self.own]

    def noise(self, sizes: list[tuple[int, ...]], offset: float) -> list[torch.Tensor]:
        """Standard normal noise [own, *size] for each size; drawn at once where they are equal.

        Args:
            sizes: (channels, height, width) of each part of the batch.
            offset: scale of the noise that each channel of a picture gets as a whole; 0 for none.
        """
        random = generator_for(self.seed, "noise", self.micro_step)
        if len(set(sizes)) == 1:
            noise = list(torch.randn((len(sizes), self.whole, *sizes[0]), generator=random)[:, self.own])
        else:
            noise = [torch.randn((self.whole, *size), generator=random)[self.own] for size in sizes]
        if offset:
            # Drawn after everything else, so that the other noise is the same with and without it.
            shape = (len(sizes), self.whole, sizes[0][0], 1, 1)
            shifts = offset * torch.randn(shape, generator=random)[:, self.own]
            noise = [part + shift for part, shift in zip(noise, shifts, strict=True)]
        return noise
