"""The base as the teacher: its own predictions are the targets for prompts of the class, other prompts and no prompt.

No paper has a name for it; trainers have it as "prior prediction" (OneTrainer) or "differential output preservation"
(ai-toolkit, with class prompts only). What the LoRA changes is only limited for prompts that the teacher is asked
about, hence the other prompts and the empty one.

Costs a forward pass of the base without gradients for each image it adds, and the image's own forward and backward
pass; an image that takes the place of a photo saves that photo's. With a bank, the base's predictions are computed
once for a fixed number of images and kept. Needs no class images; if there are any, it uses them as well.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import ClassVar

from ..files.storage import canonical_json, sha256_of
from ..machine.draws import Draws
from .base_images import BaseImages, UsesBaseImages
from .preservation import Part
from .priors import ClassPriors

TEACHER_LOSS = "teacher_loss"

FORMAT_VERSION = 1
"""Part of the key: increased when the same settings no longer give the same weights."""

CLASS_SHARE, OTHER_SHARE = 0.4, 0.5
"""Shares of the images with a sentence about the class and about something else; the rest has the empty prompt."""


class Teacher(UsesBaseImages):
    """Adds the loss between the prediction with the LoRA and that of the base, on photos and noise.

    Args:
        class_word: the kind of thing the subject is.
        priors: class images to use as well; None without.
        every: only on every so many micro-steps.
        images: number of images it adds to such a micro-step.
        replaced: number of photos that they take the place of; at least one photo stays unless ``every`` > 1.
        weight: factor of its loss at ``prior_loss_weight`` 1.
        bank: number of fixed images, with their prompt, noise and time; 0 for a new one each time.
    """

    name: ClassVar[str] = "teacher"
    losses: ClassVar[Mapping[str, str]] = {TEACHER_LOSS: "class"}

    def __init__(
        self,
        class_word: str,
        priors: ClassPriors | None = None,
        *,
        every: int = 1,
        images: int = 1,
        replaced: int = 1,
        weight: float = 8.0,
        bank: int = 0,
    ) -> None:
        super().__init__(priors, BaseImages(class_word, priors, CLASS_SHARE, OTHER_SHARE))
        self.every, self._images, self._replaced, self._weight, self._bank = every, images, replaced, weight, bank

    @classmethod
    def create(cls, class_word: str, priors: ClassPriors | None) -> Teacher:
        """Uses class images if there are any."""
        return cls(class_word, priors)

    @property
    def key(self) -> str | None:
        """A digest of settings, prompts and class images."""
        settings = [self.every, self._images, self._replaced, self._weight, self._bank]
        return sha256_of(self.name, canonical_json([FORMAT_VERSION, *settings, *self._base_images.key]))

    def prompts_for(self, seed: int, images: int) -> tuple[str, ...]:
        """Only the prompts that are drawn, so that a short run, or a small bank, encodes few."""
        return self._base_images.first_prompts(seed, self._bank or images)

    def pictures(self, photos: int) -> int:
        """The number of images in a micro-step that has any."""
        return self._images

    def replaces(self, photos: int) -> int:
        """The number of photos they take the place of. At least one photo stays, unless other micro-steps have some."""
        return min(self._replaced, photos if self.every > 1 else photos - 1)

    def parts(self, photos: Part, draws: Draws, weight: float) -> Sequence[Part]:
        """The next images: of the bank, in an endless sequence of shuffles, or new ones."""
        numbers = draws.shuffled(self._bank, "teacher") if self._bank else draws.numbers
        part = self._base_images.part(draws.seed, numbers, photos.pool, TEACHER_LOSS, self._weight * weight)
        size = tuple(photos.pool[0].shape)
        keys = [(size, number) for number in numbers] if self._bank else []
        return [replace(part, from_base=True, keys=keys)]
