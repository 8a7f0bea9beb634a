"""The interface of class preservation: what a method adds to a training step, and what it needs."""

from __future__ import annotations

from collections.abc import Callable, Hashable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import ClassVar, Protocol

import torch

from ..machine.draws import Draws
from .adapter_layer import AdapterLayer
from .curvature_estimate import CurvatureEstimate
from .priors import ClassPriors


@dataclass(frozen=True)
class Part:
    """Images of one size in a micro-step that contribute to one term of the loss.

    Attributes:
        loss: the term's name, such as "prior_loss".
        weight: the term's factor in the total loss.
        latents: float32 [b, c, h, w], on the CPU, scaled for the network.
        prompts: one per image, b.
        labels: the images' names in messages, b.
        purpose: name of the random stream of its times; parts with the same purpose get the same times.
        masks: float32 [b, 1, h, w] in 0..1, a weight for each pixel; None for 1.
        from_base: the target is the base's prediction, with the LoRA switched off, instead of the noise.
        like: the part to share noise and times with; None for new ones.
        noise: the noise, shaped like ``latents``; None to draw it, for as many images as there are photos.
        uniform: numbers in [0, 1] that become the times, float64 [b]; None to draw them.
        keys: one per image that always comes with the same latents, noise, time and prompt, b. The base's prediction
            for a key is computed once, by itself, and kept. Empty: computed each time.
        pool: for photos, the latents [c, h, w] of all photos of this size, which a method may use as well.
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
    noise: torch.Tensor | None = None
    uniform: torch.Tensor | None = None
    keys: Sequence[Hashable] = ()
    pool: Sequence[torch.Tensor] = field(default=(), repr=False)


@dataclass(frozen=True)
class PhotoLoss:
    """Another loss for the photos, computed from how well the base does on them.

    Attributes:
        name: the term's name, under which its mean is reported next to the plain loss.
        of: from each photo's plain loss and that of the base, [n] each, to what is minimised, [n].
    """

    name: str
    of: Callable[[torch.Tensor, torch.Tensor], torch.Tensor]


@dataclass(frozen=True)
class BaseIdentity:
    """Identifies the base to train on.

    Attributes:
        family: the family's name.
        digest: SHA-256 of everything in it that affects class images.
        latent_factor: image pixels per latent pixel, along a side.
    """

    family: str
    digest: str
    latent_factor: int = 8


class Preservation(Protocol):
    """A method that preserves the class while the model learns the subject.

    Implementations are subclasses, one per module of this package, registered in :mod:`trainer.preserve.ways`. The
    module's docstring names the paper, the cost and the requirements. The defaults below are those of a method that
    adds nothing.
    """

    name: ClassVar[str]
    """The name that users choose it by."""

    losses: ClassVar[Mapping[str, str]] = {}
    """The terms it adds to the loss: the label of the panel's curve by the term's name."""

    uses_class_images: ClassVar[bool] = False
    """Whether it makes use of class images, if there are any."""

    study_images: int = 0
    """Number of images for which the base's predictions are studied before training; 0 for none."""

    every: int = 1
    """It adds images to every so many micro-steps, and to the last of them."""

    @classmethod
    def create(cls, class_word: str, priors: ClassPriors | None) -> Preservation:
        """The method with its default settings.

        Args:
            class_word: the kind of thing the subject is.
            priors: the class images; None without.

        Raises:
            SubjectBoothError: it needs class images, and there are none.
        """
        ...

    @property
    def key(self) -> str | None:
        """A digest of everything that affects the trained weights, for the run's key; None if nothing does."""
        ...

    @property
    def prompts(self) -> tuple[str, ...]:
        """All prompts that images can have."""
        return ()

    def prompts_for(self, seed: int, images: int) -> tuple[str, ...]:
        """Those of :attr:`prompts` that a run needs, which are encoded before it.

        Args:
            seed: the run's seed.
            images: the number of images that the method adds over the whole run.
        """
        return self.prompts

    @property
    def record(self) -> Mapping[str, str]:
        """Entries for the record in the run's folder."""
        return {"class_images": ""}

    @property
    def metadata(self) -> Mapping[str, str]:
        """Entries for the LoRA file's metadata, besides the name."""
        return {"ss_num_reg_images": "0"}

    def check(self, size: tuple[int, ...], base: BaseIdentity) -> tuple[str, ...]:
        """Check that it can be used for this training.

        Args:
            size: (channels, height, width) of latents at the training resolution.
            base: the base to train on.

        Returns:
            warnings for the user.

        Raises:
            SubjectBoothError: it cannot.
        """
        return ()

    def pictures(self, photos: int) -> int:
        """The number of images it adds to a batch of ``photos`` photos, when it adds any."""
        return 0

    def replaces(self, photos: int) -> int:
        """The number of photos that its images take the place of in a batch of ``photos`` photos; 0 to ``photos``."""
        return 0

    def parts(self, photos: Part, draws: Draws, weight: float) -> Sequence[Part]:
        """The images it adds to a micro-step.

        Args:
            photos: the photos of this micro-step; none if all are replaced.
            draws: the random draws of this micro-step, for the images that are added.
            weight: ``prior_loss_weight``; 1 is the method's default strength.
        """
        return ()

    def photo_loss(self, weight: float) -> PhotoLoss | None:
        """The loss of the photos, if it is not the plain one.

        Args:
            weight: as for :meth:`parts`.
        """
        return None

    def study(self, seed: int, numbers: Sequence[int], pool: Sequence[torch.Tensor]) -> Part:
        """The images with these numbers, of :attr:`study_images`, for which the base is studied before training.

        Args:
            seed: the run's seed.
            numbers: from 0.
            pool: the latents [c, h, w] of photos of one size.
        """
        assert not self.study_images, "a method that studies the base says on which images"
        return Part("", 0.0, torch.empty(0), (), (), "")

    def penalty(
        self, layers: Sequence[AdapterLayer], weight: float, estimate: CurvatureEstimate | None
    ) -> Mapping[str, torch.Tensor]:
        """Terms of the loss that depend only on the adapter, by name: already weighted, and differentiable.

        Called once per step.

        Args:
            weight: as for :meth:`parts`.
            estimate: what was learned from :meth:`study`; None if nothing was studied.
        """
        return {}
