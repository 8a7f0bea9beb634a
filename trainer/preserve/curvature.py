"""A penalty on changes of the weights that would change the base's predictions for other prompts.

Elastic weight consolidation (arXiv 1612.00796) with a Kronecker-factored curvature (arXiv 1805.07810), taken from the
base's own predictions: before training, the base is studied on a few dozen images with prompts of the class, of other
things and with no prompt. The rest is :mod:`trainer.preserve.curvature_estimate`. What the LoRA does to the prediction
for such prompts is then penalised without predicting it, so that it is left with changes that only the trained words
cause.

Costs a forward and backward pass for each of the studied images, once per run; a step costs no pass, only a few small
products per group of equal layers. Needs no class images; if there are any, the base is studied on them as well.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import ClassVar

import torch

from ..files.storage import canonical_json, sha256_of
from .adapter_layer import AdapterLayer
from .base_images import BaseImages, UsesBaseImages
from .curvature_estimate import RANK, CurvatureEstimate
from .preservation import Part
from .priors import ClassPriors

CURVATURE_LOSS = "curvature_loss"

FORMAT_VERSION = 1
"""Part of the key: increased when the same settings no longer give the same weights."""

CLASS_SHARE, OTHER_SHARE = 0.6, 0.3
"""Shares of the images with a sentence about the class and about something else; the rest has the empty prompt."""


class Curvature(UsesBaseImages):
    """Adds the estimated change of the base's predictions.

    Args:
        class_word: the kind of thing the subject is.
        priors: class images to study the base on as well; None without.
        weight: its factor at ``prior_loss_weight`` 1.
        images: number of images that the base is studied on.
    """

    name: ClassVar[str] = "curvature"
    losses: ClassVar[Mapping[str, str]] = {CURVATURE_LOSS: "class"}

    def __init__(
        self, class_word: str, priors: ClassPriors | None = None, *, weight: float = 256.0, images: int = 64
    ) -> None:
        super().__init__(priors, BaseImages(class_word, priors, CLASS_SHARE, OTHER_SHARE))
        self._weight, self.study_images = weight, images

    @classmethod
    def create(cls, class_word: str, priors: ClassPriors | None) -> Curvature:
        """Uses class images if there are any."""
        return cls(class_word, priors)

    @property
    def key(self) -> str | None:
        """A digest of settings, prompts and class images."""
        settings = [FORMAT_VERSION, RANK, self._weight, self.study_images, *self._base_images.key]
        return sha256_of(self.name, canonical_json(settings))

    def prompts_for(self, seed: int, images: int) -> tuple[str, ...]:
        """Only the prompts of the studied images."""
        return self._base_images.first_prompts(seed, self.study_images)

    def study(self, seed: int, numbers: Sequence[int], pool: Sequence[torch.Tensor]) -> Part:
        """Images with these numbers."""
        return self._base_images.part(seed, numbers, pool, CURVATURE_LOSS, 0.0)

    def penalty(
        self, layers: Sequence[AdapterLayer], weight: float, estimate: CurvatureEstimate | None
    ) -> Mapping[str, torch.Tensor]:
        """``weight`` times the estimated mean squared change of the base's predictions."""
        assert estimate is not None, "the base was studied"
        return {CURVATURE_LOSS: self._weight * weight * estimate.change(layers)}
