"""The inputs of a forward pass."""

from __future__ import annotations

from collections.abc import Hashable, Sequence
from dataclasses import dataclass, field, replace

import torch

from ..base.conditioning import Conditioning
from ..machine.processes import Processes
from ..preserve.preservation import PhotoLoss


@dataclass(frozen=True)
class Batch:
    """Images of one size: photos, and those that class preservation adds.

    Attributes:
        latents: float32 [b, c, h, w], scaled for the network.
        noise: standard normal, shaped like ``latents``.
        times: [b], see :meth:`trainer.base.denoiser.Denoiser.times`.
        conditioning: batch size b.
        losses: name of each image's loss term, b; equal names are adjacent.
        masks: float32 [m, 1, h, w] in 0..1, pixel weights of the first m images; None for 1.
        prompts: the prompts of ``conditioning``.
        labels: the images' names in messages.
        from_base: bool [b], whether the target is the base's prediction; empty for no image.
        base: the base's predictions, shaped like ``latents``, for the images that need one: the target where
            ``from_base`` is true, and what a :class:`~trainer.preserve.preservation.PhotoLoss` compares with. None
            without.
        keys: see :attr:`trainer.preserve.preservation.Part.keys`, b, None for no key; empty for no image.
    """

    latents: torch.Tensor
    noise: torch.Tensor
    times: torch.Tensor
    conditioning: Conditioning
    losses: tuple[str, ...]
    masks: torch.Tensor | None = None
    prompts: tuple[str, ...] = ()
    labels: tuple[str, ...] = ()
    from_base: tuple[bool, ...] = ()
    base: torch.Tensor | None = field(default=None, repr=False)
    keys: tuple[Hashable, ...] = ()

    def to(self, device: torch.device) -> Batch:
        """The same images on ``device``."""
        return replace(
            self,
            latents=self.latents.to(device),
            noise=self.noise.to(device),
            times=self.times.to(device),
            conditioning=self.conditioning.to(device),
            masks=None if self.masks is None else self.masks.to(device),
        )

    def split(self, pictures: int) -> list[Batch]:
        """Split into micro-batches of at most ``pictures`` images."""
        count = len(self.latents)
        if pictures >= count:
            return [self]
        return [self.rows(first, min(first + pictures, count)) for first in range(0, count, pictures)]

    def rows(self, first: int, last: int) -> Batch:
        """Images ``first .. last`` (exclusive)."""
        masks = self.masks[first:last] if self.masks is not None and first < len(self.masks) else None
        return Batch(
            self.latents[first:last],
            self.noise[first:last],
            self.times[first:last],
            self.conditioning.rows(first, last),
            self.losses[first:last],
            masks,
            self.prompts[first:last],
            self.labels[first:last],
            self.from_base[first:last],
            None if self.base is None else self.base[first:last],
            self.keys[first:last],
        )


@dataclass(frozen=True)
class Term:
    """One term of a micro-step's loss.

    Attributes:
        name: such as "instance_loss".
        weight: its factor in the total loss.
        pictures: number of images in all micro-batches, over which the term is averaged.
        photo_loss: what is minimised in place of the plain loss; None for the plain loss.
    """

    name: str
    weight: float
    pictures: int
    photo_loss: PhotoLoss | None = None


@dataclass(frozen=True)
class MicroStep:
    """One gradient accumulation step: a :class:`Batch` for each image size, and the terms of the loss."""

    batches: Sequence[Batch]
    terms: tuple[Term, ...]

    @property
    def pictures(self) -> int:
        """Number of images in all batches."""
        return sum(term.pictures for term in self.terms)

    def share(self, processes: Processes) -> MicroStep:
        """The part of one process: adjacent images, about as many as each other's. The terms stay those of all."""
        if processes.count == 1:
            return self
        first, last = processes.share(sum(len(batch.losses) for batch in self.batches))
        found, before = [], 0
        for batch in self.batches:
            count = len(batch.losses)
            start, end = max(0, first - before), min(count, last - before)
            if start < end:
                found.append(batch.rows(start, end))
            before += count
        return replace(self, batches=found)
