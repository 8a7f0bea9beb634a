"""Images to compare the LoRA's predictions with the base's on: photos, class images and noise, with general prompts.

And what the methods that use them have in common.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, ClassVar

import torch

from ..machine.draws import generator_for, low_discrepancy
from .class_images import check_class_images
from .preservation import BaseIdentity, Part, Preservation
from .priors import ClassPriors
from .teacher_prompts import OTHER_SENTENCES, class_sentences

NOISE_SHARE = 0.1
"""Share of the images that are nothing but noise."""
CLASS_IMAGE_SHARE = 0.5
"""Share of class images among the other images, if there are any; the rest are photos."""
TIME_POWER = 0.5
"""Times are made of ``u ** TIME_POWER``, so that noisy images are more frequent: there the prompt decides most."""
ALL_NOISE = 1 - 2.0**-20
"""The number that becomes the last time, at which an image is all noise."""


class BaseImages:
    """An endless sequence of images, each a function of the seed and its number.

    Args:
        class_word: the kind of thing the subject is.
        priors: class images to use as well; None without.
        class_share: share of the images with a sentence about the class.
        other_share: share of the images with a sentence about something else; the rest has the empty prompt.
    """

    def __init__(self, class_word: str, priors: ClassPriors | None, class_share: float, other_share: float) -> None:
        self._priors, self._class_share, self._other_share = priors, class_share, other_share
        self._class_sentences = class_sentences(class_word)

    @property
    def prompts(self) -> tuple[str, ...]:
        """All prompts that images can have."""
        return (*self._class_sentences, *OTHER_SENTENCES, "")

    @property
    def key(self) -> list[Any]:
        """Everything that affects the images, as JSON values."""
        shares = [self._class_share, self._other_share, NOISE_SHARE, CLASS_IMAGE_SHARE, TIME_POWER]
        return [*shares, *self.prompts, self._priors.digest if self._priors else ""]

    def prompt(self, seed: int, number: int) -> str:
        """The prompt of one image."""
        random = generator_for(seed, "teacher prompt", number)
        kind, which = torch.rand(2, generator=random, dtype=torch.float64).tolist()
        if kind >= self._class_share + self._other_share:
            return ""
        sentences = self._class_sentences if kind < self._class_share else OTHER_SENTENCES
        return sentences[int(which * len(sentences))]

    def first_prompts(self, seed: int, count: int) -> tuple[str, ...]:
        """The distinct prompts of the first images, so that only these are encoded."""
        return tuple(dict.fromkeys(self.prompt(seed, number) for number in range(count)))

    def part(self, seed: int, numbers: Sequence[int], pool: Sequence[torch.Tensor], loss: str, weight: float) -> Part:
        """The images with these numbers.

        Args:
            pool: the latents [c, h, w] of photos of one size.
            loss: the term of the loss they belong to.
            weight: its factor.
        """
        prompts = [self.prompt(seed, number) for number in numbers]
        latents, noise, uniform = zip(*(self._draw(seed, number, pool) for number in numbers), strict=True)
        return Part(
            loss,
            weight,
            torch.stack(latents),
            prompts,
            [f"the base's image {number + 1} ({prompt!r})" for number, prompt in zip(numbers, prompts, strict=True)],
            "teacher",
            noise=torch.stack(noise),
            uniform=torch.tensor(uniform, dtype=torch.float64),
        )

    def _draw(self, seed: int, number: int, pool: Sequence[torch.Tensor]) -> tuple[torch.Tensor, torch.Tensor, float]:
        """Latents, noise, and the number in 0..1 that becomes the time."""
        random = generator_for(seed, "teacher image", number)
        kind, source, which = torch.rand(3, generator=random, dtype=torch.float64).tolist()
        noise = torch.randn(pool[0].shape, generator=random)
        uniform = float(low_discrepancy(number, 1, seed, "teacher times")) ** TIME_POWER
        latents: Sequence[torch.Tensor] | torch.Tensor = pool
        if self._priors and source < CLASS_IMAGE_SHARE and self._priors.latents.shape[1:] == pool[0].shape:
            latents = self._priors.latents
        image = latents[int(which * len(latents))]
        return (torch.zeros_like(image), noise, ALL_NOISE) if kind < NOISE_SHARE else (image, noise, uniform)


class UsesBaseImages(Preservation):
    """A method that uses :class:`BaseImages`, and class images among them if there are any.

    Args:
        priors: the class images; None without.
        images: the images.
    """

    uses_class_images: ClassVar[bool] = True

    def __init__(self, priors: ClassPriors | None, images: BaseImages) -> None:
        self._priors, self._base_images = priors, images

    @property
    def prompts(self) -> tuple[str, ...]:
        """All prompts that images can have."""
        return self._base_images.prompts

    @property
    def record(self) -> Mapping[str, str]:
        """The folder of the class images, which the clean-up keeps while a LoRA needs them."""
        return {"class_images": self._priors.store if self._priors else ""}

    @property
    def metadata(self) -> Mapping[str, str]:
        """The number of regularisation images, under kohya's key."""
        return {"ss_num_reg_images": str(len(self._priors.latents) if self._priors else 0)}

    def check(self, size: tuple[int, ...], base: BaseIdentity) -> tuple[str, ...]:
        """Check the class images, if there are any."""
        return check_class_images(self._priors, size, base) if self._priors else ()
