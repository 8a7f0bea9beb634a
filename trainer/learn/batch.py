"""What one forward pass takes in."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field, replace

import torch

from ..base.conditioning import Conditioning


@dataclass(frozen=True)
class Batch:
    """Pictures of one size: photos, and what a way to keep the class adds.

    Attributes:
        latents: float32 [b, c, h, w], in the training space.
        noise: like ``latents``, standard normal.
        times: [b], see :meth:`trainer.base.denoiser.Denoiser.times`.
        conditioning: b prompts.
        losses: b names, the term of the loss that each picture counts for; equal ones stand together.
        masks: float32 [m, 1, h, w] in 0..1, the part that counts of each of the first m pictures; None counts all.
        prompts: what ``conditioning`` was encoded from.
        labels: what each picture is called in messages.
        from_base: bool [b], for which pictures the base's own prediction is the target; empty for none.
        targets: like ``latents``, the base's predictions where ``from_base`` is true; None without.
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
    targets: torch.Tensor | None = field(default=None, repr=False)

    def split(self, pictures: int) -> list[Batch]:
        """The batch in micro-batches of at most that many pictures, for a device that cannot take it whole."""
        count = len(self.latents)
        if pictures >= count:
            return [self]
        return [self._rows(first, min(first + pictures, count)) for first in range(0, count, pictures)]

    def with_prompts(self, conditioning: Conditioning) -> Batch:
        """The same pictures with prompts that were encoded now."""
        return replace(self, conditioning=conditioning)

    def _rows(self, first: int, last: int) -> Batch:
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
            None if self.targets is None else self.targets[first:last],
        )


@dataclass(frozen=True)
class Term:
    """One term of a micro-step's loss.

    Attributes:
        name: such as "instance_loss".
        weight: its factor in the whole.
        pictures: over how many the term is averaged, those of all micro-batches together.
    """

    name: str
    weight: float
    pictures: int


@dataclass(frozen=True)
class MicroStep:
    """What the gradients of one batch are made of: a :class:`Batch` for each size of pictures in it, and its loss."""

    batches: Sequence[Batch]
    terms: tuple[Term, ...]

    @property
    def pictures(self) -> int:
        """Of all batches."""
        return sum(term.pictures for term in self.terms)
