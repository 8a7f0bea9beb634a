"""Class images: pictures of the class by the base itself, learned beside the photos (arXiv 2208.12242, section 3.2).

Costs a second picture in the forward and backward pass for every photo, and the making of the class images. Needs a
dozen to some hundred of them.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import ClassVar

import torch

from ..errors import SubjectBoothError
from ..machine.draws import Draws
from ..topics import Note, Topic
from .preservation import AdapterLayer, BaseIdentity, Part
from .priors import ClassPriors

PRIOR_LOSS = "prior_loss"


class ClassImages:
    """``prior_loss_weight`` times the loss on as many class images as there are photos.

    Args:
        priors: the class images.

    Raises:
        SubjectBoothError: there is not one.
    """

    name: ClassVar[str] = "class_images"
    losses: ClassVar[Mapping[str, str]] = {PRIOR_LOSS: "class"}

    def __init__(self, priors: ClassPriors) -> None:
        if len(priors.latents) == 0:
            raise SubjectBoothError(
                "no class images",
                "one or more",
                "make more class images, or exclude fewer",
                about=Topic.CLASS_IMAGES,
            )
        self._priors = priors

    @property
    def key(self) -> str | None:
        """The digest of the class images."""
        return self._priors.digest

    @property
    def prompts(self) -> tuple[str, ...]:
        """The class prompt."""
        return (self._priors.prompt,)

    @property
    def record(self) -> Mapping[str, str]:
        """The folder of the class images, so that they are not cleaned away while a LoRA needs them."""
        return {"class_images": self._priors.store}

    @property
    def metadata(self) -> Mapping[str, str]:
        """kohya's count of regularisation images."""
        return {"ss_num_reg_images": str(len(self._priors.latents))}

    def check(self, size: tuple[int, ...], base: BaseIdentity) -> tuple[str, ...]:
        """Refuse class images of another family or size, and warn about those of another base of the family."""
        priors = self._priors
        if priors.family and priors.family != base.family:
            raise SubjectBoothError(
                f"class images made by a model of the family {priors.family} for training on {base.family}",
                "class images made by the model that is trained on",
                "make the class images with the model to train on",
                about=Topic.CLASS_IMAGE_MODEL,
            )
        if tuple(priors.latents.shape[1:]) != size:
            height, width = (base.latent_factor * side for side in priors.latents.shape[2:])
            wanted = base.latent_factor * size[1]
            raise SubjectBoothError(
                f"class images of {width}x{height} pixels",
                f"the training resolution, {wanted}x{wanted}",
                f"make the class images at {wanted} pixels, or set resolution to {width}",
                about=Topic.CLASS_IMAGES,
            )
        if priors.base_digest and priors.base_digest != base.digest:
            sentence = (
                "The class images were made by another model (or with another text encoder, CLIP skip or LoRA) than "
                "the one that is trained on, so they pull the class towards that model. Unless you want that, make "
                "them with the model to train on"
            )
            return (Note(sentence, Topic.CLASS_IMAGE_MODEL),)
        return ()

    def pictures(self, photos: int) -> int:
        """As many as photos."""
        return photos

    def parts(self, photos: Part, draws: Draws, weight: float) -> Sequence[Part]:
        """The next class images of an endless sequence of shuffles."""
        numbers = draws.shuffled(len(self._priors.latents), "class images")
        prompts = [self._priors.prompt] * len(numbers)
        labels = [f"class image {number + 1}" for number in numbers]
        return [Part(PRIOR_LOSS, weight, self._priors.latents[numbers], prompts, labels, "class timesteps")]

    def penalty(self, layers: Iterator[AdapterLayer], weight: float) -> Mapping[str, torch.Tensor]:
        """Nothing."""
        return {}
