"""What a way to keep the class has to say: what it adds to a step, what that costs, and what it needs."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import ClassVar, Protocol

import torch

from ..machine.draws import Draws


@dataclass(frozen=True)
class Part:
    """Pictures of one size that a micro-step learns from, for one term of the loss.

    Attributes:
        loss: the term's name, such as "prior_loss".
        weight: the term's factor in the whole loss.
        latents: float32 [b, c, h, w], on the CPU, in the training space.
        prompts: b of them.
        labels: b, what each picture is called in messages.
        purpose: what its times are drawn for; two parts with one purpose get the same times.
        masks: float32 [b, 1, h, w] in 0..1, the part of each picture that counts; None counts all of it.
        from_base: the target is what the base predicts, the adapter switched off, and not the picture's own noise.
        like: the part whose noise and times these pictures share; None draws their own.
    """

    loss: str
    weight: float
    latents: torch.Tensor
    prompts: Sequence[str]
    labels: Sequence[str]
    purpose: str
    masks: torch.Tensor | None = None
    from_base: bool = False
    like: Part | None = field(default=None, repr=False)


@dataclass(frozen=True)
class AdapterLayer:
    """One layer's low-rank change of a weight: ``scale * up @ down``.

    Attributes:
        down: float32 [rank, in], or of a convolution [rank, in, 1, 1].
        up: float32 [out, rank], likewise.
        scale: ``alpha / rank``.
    """

    down: torch.Tensor
    up: torch.Tensor
    scale: float


@dataclass(frozen=True)
class BaseIdentity:
    """What tells the base that is trained on from others.

    Attributes:
        family: its name.
        digest: SHA-256 over what it draws class images by.
        latent_factor: pixels a side of one of its latents.
    """

    family: str
    digest: str
    latent_factor: int = 8


class Preservation(Protocol):
    """A way to keep what the model knows of the class while it learns the subject.

    Implementations are small files in this package, registered in :mod:`trainer.preserve.ways`. Their docstring names
    the paper, what it costs and what it needs.
    """

    name: ClassVar[str]
    """What a user chooses it by."""

    losses: ClassVar[Mapping[str, str]]
    """The terms that it adds to the loss, by name; with what the panel's curve is called."""

    @property
    def key(self) -> str | None:
        """What of it changes the weights, for the run's key; None where there is nothing."""
        ...

    @property
    def prompts(self) -> tuple[str, ...]:
        """What has to be encoded for it."""
        ...

    @property
    def record(self) -> Mapping[str, str]:
        """What the run's folder remembers of it."""
        ...

    @property
    def metadata(self) -> Mapping[str, str]:
        """What the LoRA file tells of it."""
        ...

    def check(self, size: tuple[int, ...], base: BaseIdentity) -> tuple[str, ...]:
        """
        Args:
            size: (channels, height, width) of latents at the training resolution.
            base: what is trained on.

        Returns:
            warnings for the user.

        Raises:
            SubjectBoothError: it cannot be used for this training.
        """
        ...

    def pictures(self, photos: int) -> int:
        """How many pictures it adds to a batch of so many photos, for the memory plan."""
        ...

    def parts(self, photos: Part, draws: Draws, weight: float) -> Sequence[Part]:
        """What it adds to one micro-step.

        Args:
            photos: what is learned from in this micro-step.
            draws: of this micro-step.
            weight: ``prior_loss_weight``.
        """
        ...

    def penalty(self, layers: Iterator[AdapterLayer], weight: float) -> Mapping[str, torch.Tensor]:
        """Terms of the loss that depend on the adapter alone, by name: each already weighted, with its gradient.

        Called once a step.
        """
        ...
