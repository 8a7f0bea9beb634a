"""What goes into a run: checked and prepared before anything expensive, with the key that it gives, then encoded."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch

from ..base.base_model import BaseModel
from ..base.finite import check_latents, check_prompts
from ..config import TrainConfig, run_key
from ..files.storage import sha256_of
from ..learn import adapter
from ..learn.data import TrainingData
from ..learn.optimizers import with_usable_optimizer
from ..machine.numerics import default_numerics
from ..preserve.preservation import BaseIdentity, Preservation
from ..subject.subject import PreparedSubject, Subject
from .encodings import EncodingCache


@dataclass(frozen=True)
class Preparation:
    """The photos as they are trained on, with the settings that can be used here.

    Attributes:
        config: as requested, but for an optimizer whose package is missing.
        photos: one group, or one for each aspect-ratio bucket.
        key: of the run, 64 hex digits.
        warnings: sentences for the user.
    """

    config: TrainConfig
    photos: tuple[PreparedSubject, ...]
    key: str
    warnings: tuple[str, ...]

    @property
    def captions(self) -> list[str]:
        """One a photo, in the order of the groups."""
        return [caption for group in self.photos for caption in group.captions]

    @property
    def buckets(self) -> dict[str, int]:
        """Photos by size ("512x512")."""
        return {f"{group.images.shape[3]}x{group.images.shape[2]}": len(group.images) for group in self.photos}


def prepare(
    base: BaseModel,
    subject: Subject,
    preservation: Preservation,
    config: TrainConfig,
    device: torch.device | None,
    cache: EncodingCache,
) -> Preparation:
    """Check that everything fits together, and prepare the photos.

    Raises:
        SubjectBoothError: photos, class images, base and settings do not fit.
    """
    config, optimizer_warning = with_usable_optimizer(config, device)
    side = config.resolution
    identity = BaseIdentity(base.family, base.sampling_digest or base.digest, base.denoiser.latent_factor)
    class_warnings = preservation.check(base.denoiser.latent_size(side, side), identity)
    mask_warning = subject.check_masks(side, buckets=config.enable_bucket) if config.masked_loss else ""
    warnings = tuple(filter(None, (optimizer_warning, *class_warnings, mask_warning, _resolution_warning(side, base))))
    photos = cache.photos(subject, config)
    digests = [group.digest for group in photos]
    digest = sha256_of(*digests) if config.enable_bucket else digests[0]
    if any(base.prompt_of(caption) != caption for group in photos for caption in group.captions):
        digest = sha256_of(digest, "literal captions")  # such a caption used to be read as a prompt's syntax
    key = run_key(config, digest, base.digest, preservation.key, subject.trigger)
    return Preparation(config, photos, key, warnings)


def check_early(base: BaseModel, prepared: Preparation, prompts: Sequence[str]) -> None:
    """Find before class images are made what a training would be refused for; nothing is loaded or read for it.

    Args:
        base: what is to be trained on.
        prepared: from :func:`prepare`, which has checked masks and class images.
        prompts: besides the captions, those of the class images and of the validation pictures.

    Raises:
        SubjectBoothError: a rank too large for the base, or a prompt that a text encoder in training cannot take in.
    """
    config = prepared.config
    network = base.denoiser.outline()
    if network is not None:
        adapter.check_layers(base.denoiser.adapter_layers(network, config.lora_targets), config.rank)
    if config.train_text_encoder and base.text is not None:
        adapter.check_rank(config.rank, base.text.narrowest)
        for prompt in dict.fromkeys([*map(base.prompt_of, prepared.captions), *prompts]):
            base.text.tokenize(prompt)


def encode(
    base: BaseModel,
    subject: Subject,
    preservation: Preservation,
    prepared: Preparation,
    shown: Sequence[str],
    cache: EncodingCache,
    device: torch.device | None,
) -> TrainingData:
    """Everything that the text encoder and the VAE have to give, while they still are in memory.

    Args:
        base: whose encoders they are.
        subject: whose photos they are.
        preservation: how the class is kept.
        prepared: from :func:`prepare`.
        shown: the prompts of the validation pictures.
        cache: what is in it is not encoded again.
        device: of the training.

    Raises:
        SubjectBoothError: an encoding is not finite.
    """
    config, groups = prepared.config, prepared.photos
    captions = tuple(map(base.prompt_of, prepared.captions))
    prompts = list(dict.fromkeys([*captions, *preservation.prompts, *shown, ""]))
    names = [f"photo {index + 1} ({subject.photos[index].name})" for group in groups for index in group.order]
    where = str(device)
    with default_numerics():
        encoded = cache.prompts(base, prompts, where)
        check_prompts(encoded)
        latents = _join_groups([cache.latents(base, group.images, where) for group in groups])
        flipped = (
            _join_groups([cache.latents(base, group.images.flip(-1), where) for group in groups])
            if config.flip
            else None
        )
        check_latents(latents, names)
        if flipped is not None:
            check_latents(flipped, names)
    masks = (
        _join_groups([_latent_masks(group, base.denoiser.latent_factor) for group in groups])
        if config.masked_loss
        else None
    )
    return TrainingData(
        latents=latents,
        captions=captions,
        encoded=encoded,
        preservation=preservation,
        flipped_latents=flipped,
        masks=masks,
        names=tuple(names),
        square=base.denoiser.latent_size(config.resolution, config.resolution),
    )


def _resolution_warning(resolution: int, base: BaseModel) -> str:
    native = base.denoiser.native_resolution
    # Below 256 it is meant so: a base for tiny pictures, such as the demo's, or a trial.
    if not 256 <= resolution < 0.6 * native:
        return ""
    return (
        f"{resolution} px is far below the {native} px that {base.family} was trained at, so pictures of "
        f"{native} px will look worse. Set resolution to {native} if memory allows"
    )


def _join_groups(groups: list[torch.Tensor]) -> torch.Tensor | tuple[torch.Tensor, ...]:
    """Groups of pictures of one size each, as one sequence of pictures."""
    return groups[0] if len(groups) == 1 else tuple(picture for group in groups for picture in group)


def _latent_masks(group: PreparedSubject, factor: int) -> torch.Tensor:
    assert group.masks is not None  # Subject.check_masks refuses a subject without any
    return torch.nn.functional.interpolate(group.masks, scale_factor=1 / factor, mode="area")
