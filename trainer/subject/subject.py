"""The subject: its photos, what they are called, and how they become square training images."""

from __future__ import annotations

import hashlib
import textwrap
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace

import numpy as np
import torch

from ..errors import SubjectBoothError
from ..files.storage import sha256_of
from ..topics import Topic
from .buckets import nearest_bucket
from .captions import DEFAULT_CLASS_TEMPLATE, DEFAULT_TEMPLATE, WEIGHT, check_template, fill_template
from .checks import check_photos
from .crops import CROPS, is_mask_outside_crop, training_picture
from .notes import join_names
from .photo import Photo
from .trigger import DEFAULT_TOKEN, check_token, check_word

MIN_RESOLUTION, MAX_RESOLUTION = 64, 4096


@dataclass(frozen=True)
class PreparedSubject:
    """Images of one size, ready for the latent codec.

    The order is by content, not by file name, so that a renamed photo changes nothing about a run.

    Attributes:
        images: float32 [n, 3, h, w] in 0..1, on the CPU; square but for aspect-ratio buckets.
        masks: float32 [n, 1, h, w] in 0..1, None when no photo has one (among others, one without is all 1).
        captions: one an image.
        digest: SHA-256 over pixels, masks and captions.
        order: ``images[i]`` is made of the subject's ``photos[order[i]]``.
    """

    images: torch.Tensor
    masks: torch.Tensor | None
    captions: tuple[str, ...]
    digest: str
    order: tuple[int, ...] = ()


@dataclass(frozen=True)
class Subject:
    """What is to be learned: photos, the words for it, and how the photos are cropped.

    Attributes:
        resolution: pixels, a multiple of 8.
        crop: ``center`` (the largest square in the middle), ``pad`` (all of the picture, bars in its border's
            mean colour), or ``subject`` (a square around the mask; ``center`` for photos without one).
        prompt_template: with ``{token}``, ``{class}`` or ``{subject}`` (both) in it.
        warnings: sentences about what may spoil a run.
    """

    photos: tuple[Photo, ...]
    token: str
    class_word: str
    resolution: int
    crop: str
    prompt_template: str
    warnings: tuple[str, ...] = ()

    @property
    def trigger(self) -> str:
        """The trained words: ``"ohwx dog"``."""
        return f"{self.token} {self.class_word}"

    @property
    def instance_prompt(self) -> str:
        """``"a photo of ohwx dog"``."""
        return fill_template(self.prompt_template, self.token, self.class_word)

    @property
    def class_prompt(self) -> str:
        """``"a photo of a dog"``, with the article that fits."""
        return fill_template(DEFAULT_CLASS_TEMPLATE, self.token, self.class_word)

    def prepare(self, resolution: int | None = None, *, with_masks: bool = True) -> PreparedSubject:
        """Crop and scale every photo.

        Args:
            resolution: side in pixels; the subject's own when None.
            with_masks: without, masks say no more than where to crop, and count for no more in the digest.

        Raises:
            SubjectBoothError: a resolution that is no multiple of 8 or out of range.
        """
        side = check_resolution(self.resolution if resolution is None else resolution)
        return self._prepare(range(len(self.photos)), (side, side), f"subject 1 {side}", with_masks)

    def prepare_buckets(self, resolution: int | None = None, *, with_masks: bool = True) -> tuple[PreparedSubject, ...]:
        """Crop and scale every photo to the aspect-ratio bucket that is nearest to its shape.

        Args:
            resolution: the side of the square whose area all buckets have about; the subject's own when None.
            with_masks: as for :meth:`prepare`.

        Returns:
            the photos of each bucket that has some.

        Raises:
            SubjectBoothError: as for :meth:`prepare`.
        """
        side = check_resolution(self.resolution if resolution is None else resolution)
        sizes = [nearest_bucket(photo.pixels.shape[1], photo.pixels.shape[0], side) for photo in self.photos]
        return tuple(
            self._prepare(
                [index for index, own in enumerate(sizes) if own == size],
                size,
                f"subject bucket {size[0]}x{size[1]}",
                with_masks,
            )
            for size in sorted(set(sizes))
        )

    def check_masks(self, resolution: int, *, buckets: bool = False) -> str:
        """For a masked loss: a warning about photos whose mask is outside the crop, empty when there are none.

        Args:
            resolution: of the training, in pixels.
            buckets: photos are cropped to aspect-ratio buckets.

        Raises:
            SubjectBoothError: no photo has a mask, or none has anything of it left, so that nothing would be learned.
        """
        if all(photo.mask is None for photo in self.photos):
            raise SubjectBoothError(
                "masked_loss without a mask",
                "a mask for the photos",
                "use photos with transparency, or turn masked_loss off",
                "masked_loss",
                Topic.MASK,
            )
        cut = self._masks_outside_crop(resolution, buckets)
        if len(cut) == len(self.photos):
            raise SubjectBoothError(
                f"masked_loss, and every mask is outside the crop {self.crop!r}: {join_names(cut, 10)}",
                "part of the mask inside the crop, or there is nothing to learn",
                'set crop to "subject" or "pad", or turn masked_loss off',
                "masked_loss",
                Topic.CROP,
            )
        return mask_outside_crop_warning(cut, self.crop)

    def _masks_outside_crop(self, resolution: int, buckets: bool = False) -> list[str]:
        """Names of the photos of whose mask the crop leaves nothing."""
        cut = []
        for photo in self.photos:
            height, width = photo.pixels.shape[:2]
            size = nearest_bucket(width, height, resolution) if buckets else (resolution, resolution)
            if is_mask_outside_crop(photo, size, self.crop):
                cut.append(photo.name)
        return cut

    def _prepare(self, indices: Sequence[int], size: tuple[int, int], kind: str, with_masks: bool) -> PreparedSubject:
        photos = [self.photos[index] for index in indices]
        pictures = [training_picture(photo, size, self.crop) for photo in photos]
        any_mask = with_masks and any(photo.mask is not None for photo in self.photos)
        full = np.full((size[1], size[0]), 255, dtype=np.uint8)
        items = []
        for index, photo, (pixels, mask) in zip(indices, photos, pictures, strict=True):
            mask = (full if mask is None else mask) if any_mask else None
            content = sha256_of(pixels.tobytes(), b"" if mask is None else mask.tobytes(), photo.caption)
            items.append((content, index, pixels, mask))
        items.sort(key=lambda item: item[0])
        digest = hashlib.sha256(f"{kind} {any_mask};".encode())
        for content, *_ in items:
            digest.update(content.encode())
        order = tuple(index for _, index, _, _ in items)
        captions = tuple(self.photos[index].caption for index in order)
        # ComfyUI runs nodes in inference mode, and what is made there can never be trained on.
        with torch.inference_mode(False):
            batch = torch.from_numpy(np.stack([pixels for _, _, pixels, _ in items]))
            images = (batch.permute(0, 3, 1, 2).float() / 255.0).contiguous()
            masks = None
            if any_mask:
                stacked = np.stack([mask for *_, mask in items if mask is not None])
                masks = torch.from_numpy(stacked)[:, None].float() / 255.0
        return PreparedSubject(images, masks, captions, digest.hexdigest(), order)


def make_subject(
    photos: Sequence[Photo],
    *,
    class_word: str,
    token: str = DEFAULT_TOKEN,
    resolution: int = 512,
    crop: str = "center",
    prompt_template: str = DEFAULT_TEMPLATE,
    tokenize: Callable[[str], list[int]] | None = None,
    notes: Sequence[str] = (),
) -> Subject:
    """Check everything, collect the warnings, and put a subject together.

    Args:
        photos: at least one. Those with an empty caption get the filled-in template.
        tokenize: CLIP token ids of a text, for the check of the token; None skips that check.
        notes: further sentences to warn with, such as those of the reading.

    Raises:
        SubjectBoothError: no photo, or a setting that cannot be used.
    """
    token = check_word(token, "token", DEFAULT_TOKEN)
    class_word = check_word(class_word, "class_word", "dog")
    template = check_template(prompt_template, needs_token=True)
    check_resolution(resolution)
    if crop not in CROPS:
        raise SubjectBoothError(f"crop {crop!r}", f"one of {', '.join(CROPS)}", "choose one of them", "crop")
    if not photos:
        raise SubjectBoothError("no photo was given", "3 to 5 photos of the subject", "add photos")
    prompt = fill_template(template, token, class_word)
    filled = tuple(
        Photo(p.pixels, p.mask, fill_template(p.caption, token, class_word) if p.caption else prompt, p.name)
        for p in photos
    )
    warnings = [*notes, *check_photos(filled, resolution), *check_token(token, class_word, tokenize)]
    if "{class}" not in template and "{subject}" not in template:
        warnings.append(
            "prompt_template has no {class}: naming what the subject is one of helps more than any other setting."
        )
    weights = [found[0] for p in filled if (found := WEIGHT.search(p.caption))]
    if weights:
        warnings.append(
            f"{len(weights)} of {len(filled)} captions have a weight in them ({weights[0][:60]}): captions are learned "
            "as they are written, so it is text and no weight."
        )
    unnamed = [p.name for p in filled if token.casefold() not in p.caption.casefold()]
    if unnamed:
        warnings.append(
            f"{len(unnamed)} of {len(filled)} captions (the first is that of {unnamed[0]}) do not have the "
            f'token "{token}" in them, so those photos teach it nothing.'
        )
    subject = Subject(filled, token, class_word, resolution, crop, template)
    warnings += filter(None, [mask_outside_crop_warning(subject._masks_outside_crop(resolution), crop)])
    return replace(subject, warnings=tuple(warnings))


def mask_outside_crop_warning(names: Sequence[str], crop: str) -> str:
    """A sentence about photos of whose mask the crop leaves nothing; empty when there are none."""
    if not names:
        return ""
    masks, photos = ("mask", "the photo teaches") if len(names) == 1 else ("masks", "these photos teach")
    return (
        f"The {masks} of {join_names(names)} {'is' if len(names) == 1 else 'are'} outside the crop {crop!r}: {photos} "
        'nothing with masked_loss, and only background without. Set crop to "subject" or "pad".'
    )


def caption_lines(subject: Subject, most: int = 12) -> list[str]:
    """``"a.png: ohwx on a sofa"`` for each photo, to be shown: the first ones, and how many more there are."""
    shown = [f"{photo.name}: {textwrap.shorten(photo.caption, 200, placeholder=' ...')}" for photo in subject.photos]
    return shown if len(shown) <= most else [*shown[: most - 1], f"and {len(shown) - most + 1} more"]


def check_resolution(resolution: int) -> int:
    """``resolution`` when it is a usable training size.

    Raises:
        SubjectBoothError: not a whole number, not a multiple of 8, below 64 or above 4096.
    """
    if isinstance(resolution, bool) or not isinstance(resolution, int):
        raise SubjectBoothError(f"resolution {resolution!r}", "a whole number of pixels", "use 512", "resolution")
    if not MIN_RESOLUTION <= resolution <= MAX_RESOLUTION:
        raise SubjectBoothError(
            f"resolution {resolution}",
            f"{MIN_RESOLUTION} to {MAX_RESOLUTION} pixels",
            "use 512 for SD 1.5, 768 for SD 2.x, 1024 for SDXL",
            "resolution",
        )
    if resolution % 8:
        raise SubjectBoothError(
            f"resolution {resolution}",
            "a multiple of 8 (latents are 8 times smaller than pixels)",
            f"use {resolution // 8 * 8}",
            "resolution",
        )
    return resolution
