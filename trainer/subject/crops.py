"""Crop and scale photos to training images."""

from __future__ import annotations

import numpy as np
from PIL import Image

from .photo import Photo

CROPS = ("center", "pad", "subject")
_SUBJECT_MARGIN = 0.1
"""Margin around the mask's bounding box for crop "subject", as a fraction of the box."""
_MIN_MASK_INSIDE = 0.01
"""Fraction of a mask that must be inside the crop; less is only a sliver at the border."""


def training_square(photo: Photo, side: int, crop: str) -> tuple[np.ndarray, np.ndarray | None]:
    """A square training image: pixels uint8 [side, side, 3] and mask uint8 [side, side] or None.

    Args:
        photo: the photo, before cropping.
        side: pixels.
        crop: one of :data:`CROPS`.
    """
    return training_picture(photo, (side, side), crop)


def training_picture(photo: Photo, size: tuple[int, int], crop: str) -> tuple[np.ndarray, np.ndarray | None]:
    """A training image of any (width, height): uint8 [height, width, 3] and uint8 [height, width] or None."""
    image = Image.fromarray(photo.pixels)
    # 8 bits are enough for a mask, and hash to the same digest on every machine, unlike floats.
    mask = None if photo.mask is None else Image.fromarray(np.rint(photo.mask * 255.0).astype(np.uint8))
    if crop == "pad":
        image, mask = _padded(image, mask, size)
    box = _crop_box(photo, image.size, size, crop)
    # Crop before scaling, so that nothing from outside the box bleeds in at its border.
    pixels = image.crop(box).resize(size, Image.Resampling.LANCZOS)
    # Lanczos overshoots at a mask's hard edges; a bilinear filter does not.
    scaled = None if mask is None else np.array(mask.crop(box).resize(size, Image.Resampling.BILINEAR))
    return np.array(pixels), scaled


def _crop_box(photo: Photo, available: tuple[int, int], size: tuple[int, int], crop: str) -> tuple[int, int, int, int]:
    """The crop box (left, top, right, bottom) with the aspect ratio of ``size``, inside ``available``."""
    width, height = available
    scale = min(width / size[0], height / size[1])  # photo pixels per training pixel
    center_x, center_y = width / 2, height / 2
    if crop == "subject" and not photo.is_cropped and photo.mask is not None and (photo.mask >= 0.5).any():
        rows = np.flatnonzero((photo.mask >= 0.5).any(axis=1))
        columns = np.flatnonzero((photo.mask >= 0.5).any(axis=0))
        extent = max((columns[-1] - columns[0] + 1) / size[0], (rows[-1] - rows[0] + 1) / size[1])
        # Never enlarge: a small subject would gain blur but no detail.
        scale = min(scale, max(float(extent) * (1 + 2 * _SUBJECT_MARGIN), 1.0))
        center_x, center_y = (columns[0] + columns[-1] + 1) / 2, (rows[0] + rows[-1] + 1) / 2
    box_width, box_height = min(round(size[0] * scale), width), min(round(size[1] * scale), height)
    left = min(max(int(center_x - box_width / 2), 0), width - box_width)
    top = min(max(int(center_y - box_height / 2), 0), height - box_height)
    return left, top, left + box_width, top + box_height


def _padded(
    image: Image.Image, mask: Image.Image | None, size: tuple[int, int]
) -> tuple[Image.Image, Image.Image | None]:
    """Centre the image on bars that give it the aspect ratio of ``size``, in the mean colour of the adjacent edges."""
    scale = max(image.width / size[0], image.height / size[1])
    whole = max(round(size[0] * scale), image.width), max(round(size[1] * scale), image.height)
    if whole == image.size:
        return image, mask
    pixels = np.asarray(image, dtype=np.float64)
    edges = pixels[[0, -1]] if whole[1] > image.height else pixels[:, [0, -1]]
    colour = tuple(int(v) for v in np.rint(edges.reshape(-1, 3).mean(axis=0)))
    corner = ((whole[0] - image.width) // 2, (whole[1] - image.height) // 2)
    padded = Image.new("RGB", whole, colour)
    padded.paste(image, corner)
    if mask is not None:
        padded_mask = Image.new("L", whole, 0)
        padded_mask.paste(mask, corner)
        mask = padded_mask
    return padded, mask


def is_mask_outside_crop(photo: Photo, size: tuple[int, int], crop: str) -> bool:
    """Whether (almost) the whole mask is outside the crop; False for a photo without a mask.

    Args:
        photo: the photo, before cropping.
        size: width and height of the training image.
        crop: one of :data:`CROPS`.
    """
    if photo.mask is None or crop == "pad":  # "pad" keeps the whole photo
        return False
    left, top, right, bottom = _crop_box(photo, (photo.mask.shape[1], photo.mask.shape[0]), size, crop)
    return bool(photo.mask[top:bottom, left:right].sum() <= _MIN_MASK_INSIDE * photo.mask.sum())
