"""Prepares a run: checks the inputs before anything expensive, computes the run key, and encodes photos and prompts."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch

from ..base.base_model import BaseModel
from ..base.conditioning import in_parts
from ..base.finite import check_latents, check_prompts
from ..config import TrainConfig, run_key
from ..errors import SubjectBoothError
from ..files.storage import sha256_of
from ..learn import adapter
from ..learn.data import Photos, ProbePrompts, TrainingData
from ..learn.optimizers import with_usable_optimizer
from ..machine.numerics import default_numerics
from ..machine.runtime import rounding
from ..preserve.preservation import BaseIdentity, Preservation
from ..subject.subject import PreparedSubject, Subject
from .encodings import EncodingCache

SCENES = ("on a beach", "at night")
"""Words that are unlikely to fit a photo of the subject. Two, because one may."""

MIRRORED_AT_ONCE = 32
"""A codec may come to the device for each part."""

HELD_OUT_FROM, HELD_OUT_CROPS = 4, 2
"""A run of this many photos or more scores this many crops that are not trained on."""

CROP_MARGIN = 1 / 16
"""What a held-out crop leaves out at each edge, as a share of the side."""


@dataclass(frozen=True)
class Preparation:
    """The prepared photos and settings of a run.

    Attributes:
        config: the requested settings, with AdamW in place of an unavailable optimizer.
        photos: one group, or one per aspect-ratio bucket.
        key: the run key, 64 hex digits.
        warnings: sentences for the user.
    """

    config: TrainConfig
    photos: tuple[PreparedSubject, ...]
    key: str
    warnings: tuple[str, ...]

    @property
    def captions(self) -> list[str]:
        """The photos' captions, in the order of the groups."""
        return [caption for group in self.photos for caption in group.captions]

    @property
    def buckets(self) -> dict[str, int]:
        """Number of photos by size ("512x512")."""
        return {f"{group.images.shape[3]}x{group.images.shape[2]}": len(group.images) for group in self.photos}


def prepare(
    base: BaseModel,
    subject: Subject,
    preservation: Preservation,
    config: TrainConfig,
    device: torch.device | None,
    cache: EncodingCache,
) -> Preparation:
    """Check that all inputs are compatible, and prepare the photos.

    Raises:
        SubjectBoothError: photos, class images, base and settings are not compatible.
    """
    if config.train_text_encoder and base.text is None:
        raise SubjectBoothError(
            f"train_text_encoder with {base.family}",
            "a base of Stable Diffusion 1.x, 2.x or XL, whose text encoders can be trained",
            "turn off train_text_encoder",
            "train_text_encoder",
        )
    config, optimizer_warning = with_usable_optimizer(config, device)
    side = config.resolution
    identity = BaseIdentity(base.family, base.sampling_digest or base.digest, base.denoiser.latent_factor)
    class_warnings = preservation.check(base.denoiser.latent_size(side, side), identity)
    mask_warning = subject.check_masks(side, buckets=config.enable_bucket) if config.masked_loss else ""
    warnings = tuple(
        filter(None, (base.note, optimizer_warning, *class_warnings, mask_warning, _resolution_warning(side, base)))
    )
    photos = cache.photos(subject, config)
    digests = [group.digest for group in photos]
    digest = sha256_of(*digests) if config.enable_bucket else digests[0]
    if any(base.prompt_of(caption) != caption for group in photos for caption in group.captions):
        digest = sha256_of(digest, "literal captions")  # earlier versions parsed them as prompt syntax
    key = run_key(config, digest, base.digest, preservation.key, subject.trigger, rounding(config, device))
    return Preparation(config, photos, key, warnings)


def check_early(base: BaseModel, prepared: Preparation, prompts: Sequence[str]) -> None:
    """Check rank and prompts before class images are generated. Loads no weights.

    Args:
        base: the base to train on.
        prepared: from :func:`prepare`, which has already checked masks and class images.
        prompts: the prompts of class images and validation images; captions are checked as well.

    Raises:
        SubjectBoothError: the rank is too large for the base, or a trained text encoder cannot tokenize a prompt.
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
    validation_prompts: Sequence[str],
    cache: EncodingCache,
    device: torch.device | None,
) -> TrainingData:
    """Encode photos and prompts, before text encoder and VAE are unloaded.

    Args:
        base: the base with its encoders.
        subject: the subject with its photos.
        preservation: the method of class preservation.
        prepared: from :func:`prepare`.
        validation_prompts: the prompts of the validation images.
        cache: encodings to reuse; new ones are added.
        device: the training device.

    Raises:
        SubjectBoothError: an encoding contains NaN or infinity.
    """
    config, groups = prepared.config, prepared.photos
    captions = tuple(map(base.prompt_of, prepared.captions))
    micro_steps = config.steps * config.gradient_accumulation_steps
    images = micro_steps // preservation.every * preservation.pictures(config.train_batch_size)
    added = preservation.prompts_for(config.seed, images)
    probe = probe_prompts(subject, base) if config.kept_interval else None
    prompts = list(dict.fromkeys([*captions, *added, *validation_prompts, *(probe.all if probe else ()), ""]))
    names = [f"photo {index + 1} ({subject.photos[index].name})" for group in groups for index in group.order]
    where = str(device)
    with default_numerics():
        encoded = cache.prompts(base, prompts, where)
        check_prompts(encoded)
        latents = _join_groups([cache.latents(base, group.images, where) for group in groups])
        flipped = (
            _join_groups([_mirrored_latents(base, group.images, cache, where) for group in groups])
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
    held_out = None
    if probe is not None and len(captions) >= HELD_OUT_FROM:
        held_out = _held_out(groups, captions, base, config, cache, where)
        check_latents(held_out.latents, names[:HELD_OUT_CROPS])
    return TrainingData(
        latents=latents,
        captions=captions,
        encoded=encoded,
        preservation=preservation,
        flipped_latents=flipped,
        masks=masks,
        names=tuple(names),
        square=base.denoiser.latent_size(config.resolution, config.resolution),
        probe=probe,
        held_out=held_out,
    )


def _mirrored_latents(base: BaseModel, images: torch.Tensor, cache: EncodingCache, where: str) -> torch.Tensor:
    """Latents of the mirrored images, of which only a part is in memory at once."""
    return torch.cat([cache.latents(base, part.flip(-1), where) for part in in_parts(images, MIRRORED_AT_ONCE)])


def probe_prompts(subject: Subject, base: BaseModel) -> ProbePrompts:
    """The prompts that a run's scores compare."""
    named, plain = f"a photo of {subject.trigger}", subject.class_prompt
    in_scenes = [tuple(base.prompt_of(f"{prompt} {scene}") for scene in SCENES) for prompt in (named, plain)]
    return ProbePrompts(base.prompt_of(named), base.prompt_of(plain), *in_scenes)


def _held_out(
    groups: Sequence[PreparedSubject],
    captions: tuple[str, ...],
    base: BaseModel,
    config: TrainConfig,
    cache: EncodingCache,
    where: str,
) -> Photos:
    """Crops of the first photos."""
    images = [image for group in groups for image in group.images][:HELD_OUT_CROPS]
    with default_numerics():
        latents = [cache.latents(base, held_out_crop(image), where)[0] for image in images]
    masks = None
    if config.masked_loss:
        whole = [mask for group in groups if group.masks is not None for mask in group.masks][:HELD_OUT_CROPS]
        masks = [_to_latents(held_out_crop(mask), base.denoiser.latent_factor)[0] for mask in whole]
    return Photos(latents, captions[:HELD_OUT_CROPS], masks)


def held_out_crop(image: torch.Tensor) -> torch.Tensor:
    """The middle of a photo or a mask, enlarged to its size: [c, h, w] -> [1, c, h, w]."""
    height, width = image.shape[1:]
    top, left = round(height * CROP_MARGIN), round(width * CROP_MARGIN)
    middle = image[None, :, top : height - top, left : width - left]
    return torch.nn.functional.interpolate(middle, size=(height, width), mode="bicubic").clamp(0, 1)


def _resolution_warning(resolution: int, base: BaseModel) -> str:
    native = base.denoiser.native_resolution
    # Below 256 px it is on purpose: a base for tiny images, such as the demo's, or a quick trial.
    if not 256 <= resolution < 0.6 * native:
        return ""
    return (
        f"{resolution} px is far below the {native} px that {base.family} was trained at, so images of "
        f"{native} px will look worse. Set resolution to {native} if memory allows"
    )


def _join_groups(groups: list[torch.Tensor]) -> torch.Tensor | tuple[torch.Tensor, ...]:
    """Groups of images, each of one size, as one sequence of images."""
    return groups[0] if len(groups) == 1 else tuple(image for group in groups for image in group)


def _latent_masks(group: PreparedSubject, factor: int) -> torch.Tensor:
    assert group.masks is not None  # Subject.check_masks rejects a subject without masks
    return _to_latents(group.masks, factor)


def _to_latents(masks: torch.Tensor, factor: int) -> torch.Tensor:
    return torch.nn.functional.interpolate(masks, scale_factor=1 / factor, mode="area")
