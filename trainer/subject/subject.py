"""The subject: its photos, its trigger words, and its training images."""

from __future__ import annotations

import hashlib
import textwrap
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace

import numpy as np
import torch

from ..errors import SubjectBoothError, check_choice
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

    They are sorted by content, not by file name, so that renaming a photo does not affect a run.

    Attributes:
        images: float32 [n, 3, h, w] in 0..1, on the CPU; square unless bucketed.
        masks: float32 [n, 1, h, w] in 0..1; None if no photo has a mask (otherwise all 1 for a photo without one).
        captions: one per image.
        digest: SHA-256 of pixels, masks and captions.
        order: ``images[i]`` comes from the subject's ``photos[order[i]]``.
    """

    images: torch.Tensor
    masks: torch.Tensor | None
    captions: tuple[str, ...]
    digest: str
    order: tuple[int, ...] = ()


@dataclass(frozen=True)
class Subject:
    """The subject to train: its photos, its words, and how to crop the photos.

    Attributes:
        resolution: pixels, a multiple of 8.
        crop: ``center`` (the largest centred square), ``pad`` (the whole photo, with bars in the mean colour of its
            edges), or ``subject`` (a square around the mask; ``center`` for photos without one).
        prompt_template: contains ``{token}``, ``{class}`` or ``{subject}`` (both).
        warnings: sentences about possible problems.
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
        """The trigger words: ``"ohwx dog"``."""
        return f"{self.token} {self.class_word}"

    @property
    def instance_prompt(self) -> str:
        """``"a photo of ohwx dog"``."""
        return fill_template(self.prompt_template, self.token, self.class_word)

    @property
    def class_prompt(self) -> str:
        """``"a photo of a dog"``, with the right article."""
        return fill_template(DEFAULT_CLASS_TEMPLATE, self.token, self.class_word)

    def prepare(self, resolution: int | None = None, *, with_masks: bool = True) -> PreparedSubject:
        """Crop and scale every photo.

        Args:
            resolution: side in pixels; None for the subject's resolution.
            with_masks: False: masks only affect the crop, and are not part of the digest.

        Raises:
            SubjectBoothError: the resolution is out of range or not a multiple of 8.
        """
        side = check_resolution(self.resolution if resolution is None else resolution)
        return self._prepare(range(len(self.photos)), (side, side), f"subject 1 {side}", with_masks)

    def prepare_buckets(self, resolution: int | None = None, *, with_masks: bool = True) -> tuple[PreparedSubject, ...]:
        """Crop and scale every photo to the nearest aspect-ratio bucket.

        Args:
            resolution: side of a square with about the same area as all buckets; None for the subject's resolution.
            with_masks: as for :meth:`prepare`.

        Returns:
            The photos of each bucket that is not empty.

        Raises:
            SubjectBoothError: as for :meth:`prepare`.
        """
        side = check_resolution(self.resolution if resolution is None else resolution)
        sizes = [nearest_bucket(photo.pixels.shape[1], photo.pixels.shape[0], side) for photo in self.photos]
        return tuple(
            self._prepare(
                [index for index, bucket in enumerate(sizes) if bucket == size],
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
                "at least part of a mask inside the crop, so that there is something to learn",
                'set crop to "subject" or "pad", or turn masked_loss off',
                "masked_loss",
                Topic.CROP,
            )
        return mask_outside_crop_warning(cut, self.crop)

    def _masks_outside_crop(self, resolution: int, buckets: bool = False) -> list[str]:
        """Names of the photos whose mask is outside the crop."""
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
        # ComfyUI runs nodes in inference mode, and tensors created there cannot be used for training.
        with torch.inference_mode(False):
            images = torch.empty(len(items), 3, size[1], size[0], dtype=torch.float32, device="cpu")
            for image, (_, _, pixels, _) in zip(images, items, strict=True):  # no second copy of all of them
                image.copy_(torch.from_numpy(pixels).permute(2, 0, 1)).div_(255.0)
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
    """Create a subject: check everything and collect the warnings.

    Args:
        photos: at least one. Those with an empty caption get the filled-in template.
        tokenize: returns the CLIP token ids of a text, to check the token; None skips that check.
        notes: further warnings, such as those from reading the photos.

    Raises:
        SubjectBoothError: no photos, or an invalid setting.
    """
    token = check_word(token, "token", DEFAULT_TOKEN)
    class_word = check_word(class_word, "class_word", "dog")
    template = check_template(prompt_template, needs_token=True)
    check_resolution(resolution)
    check_choice("crop", crop, CROPS)
    if not photos:
        raise SubjectBoothError("no photos were given", "3 to 5 photos of the subject", "add photos")
    prompt = fill_template(template, token, class_word)
    filled = tuple(
        replace(p, caption=fill_template(p.caption, token, class_word) if p.caption else prompt) for p in photos
    )
    warnings = [*notes, *check_photos(filled, resolution), *check_token(token, class_word, tokenize)]
    if "{class}" not in template and "{subject}" not in template:
        warnings.append("prompt_template has no {class}: naming the class helps more than any other setting.")
    weights = [found[0] for p in filled if (found := WEIGHT.search(p.caption))]
    if weights:
        warnings.append(
            f"{len(weights)} of {len(filled)} captions contain a prompt weight ({weights[0][:60]}). Captions are taken "
            "literally, so it is treated as text."
        )
    unnamed = [p.name for p in filled if token.casefold() not in p.caption.casefold()]
    if unnamed:
        warnings.append(
            f"{len(unnamed)} of {len(filled)} captions (first: {unnamed[0]}) do not contain the "
            f'token "{token}", so these photos do not train it.'
        )
    subject = Subject(filled, token, class_word, resolution, crop, template)
    warnings += filter(None, [mask_outside_crop_warning(subject._masks_outside_crop(resolution), crop)])
    return replace(subject, warnings=tuple(warnings))


def mask_outside_crop_warning(names: Sequence[str], crop: str) -> str:
    """A warning about photos whose mask is outside the crop; empty if there are none."""
    if not names:
        return ""
    masks, photos = ("mask", "this photo trains") if len(names) == 1 else ("masks", "these photos train")
    return (
        f"The {masks} of {join_names(names)} {'is' if len(names) == 1 else 'are'} outside the crop {crop!r}: {photos} "
        'nothing with masked_loss, and only the background without it. Set crop to "subject" or "pad".'
    )


def caption_lines(subject: Subject, most: int = 12) -> list[str]:
    """``"a.png: ohwx on a sofa"`` for each photo, for display; a long list is shortened to ``most`` lines."""
    shown = [f"{photo.name}: {textwrap.shorten(photo.caption, 200, placeholder=' ...')}" for photo in subject.photos]
    return shown if len(shown) <= most else [*shown[: most - 1], f"and {len(shown) - most + 1} more"]


def check_resolution(resolution: int) -> int:
    """Return ``resolution`` if it is a valid training size.

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
