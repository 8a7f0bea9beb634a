"""Images to compare the LoRA's predictions with the base's on: photos, class images and noise, with general prompts."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch

from ..machine.draws import generator_for, low_discrepancy
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

    def draw(
        self, seed: int, number: int, pool: Sequence[torch.Tensor]
    ) -> tuple[torch.Tensor, torch.Tensor, float, str]:
        """Latents, noise, the number in 0..1 that becomes the time, and the prompt.

        Args:
            pool: the latents [c, h, w] of the photos.
        """
        random = generator_for(seed, "teacher image", number)
        kind, source, which, prompt, sentence = torch.rand(5, generator=random, dtype=torch.float64).tolist()
        noise = torch.randn(pool[0].shape, generator=random)
        uniform = float(low_discrepancy(number, 1, seed, "teacher times")) ** TIME_POWER
        latents: Sequence[torch.Tensor] | torch.Tensor = pool
        if self._priors and source < CLASS_IMAGE_SHARE and self._priors.latents.shape[1:] == pool[0].shape:
            latents = self._priors.latents
        image = latents[int(which * len(latents))]
        if kind < NOISE_SHARE:
            image, uniform = torch.zeros_like(image), ALL_NOISE
        if prompt >= self._class_share + self._other_share:
            return image, noise, uniform, ""
        sentences = self._class_sentences if prompt < self._class_share else OTHER_SENTENCES
        return image, noise, uniform, sentences[int(sentence * len(sentences))]
