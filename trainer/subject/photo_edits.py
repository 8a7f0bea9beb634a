"""What the user sets for single photos: where one is cropped, and its caption.

As text, so that a workflow carries it and a client can send it; the photos themselves stay as they are:

.. code-block:: json

    {"rex.jpg": {"crop": [0.5, 0.4, 0.8], "caption": "a photo of {token} {class} on grass"}}

``crop`` is a square: its centre as fractions of the photo's width and height, and its side as a fraction of the photo's
shorter side. A square that would reach over the border is moved inside. ``mask`` names a picture of the photo in which
the subject is painted transparent, as mask editors write it; the front end knows where it is.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image, ImageOps

from ..errors import SubjectBoothError
from .captions import check_text
from .notes import join_names
from .photo import Photo
from .photos import ORIENTATION, check_size

NAME = "photo_edits"
EXAMPLE = '{"rex.jpg": {"crop": [0.5, 0.4, 0.8], "caption": "a photo of {token} {class} on grass"}}'
SMALLEST = 0.05
"""Side of the smallest square, as a fraction of the photo's shorter side."""
MAX_LETTERS = 2000
"""Length of a caption: CLIP reads about 300 letters, and T5 2,000."""

MAX_NAME = 250
"""Length of the name of a mask's file."""

EDITORS_NAME = "clipspace-"
"""How the names of the files begin that ComfyUI's mask editor writes."""

Square = tuple[float, float, float]
"""Centre x and y as fractions of width and height, and side as a fraction of the shorter side."""


@dataclass(frozen=True)
class PhotoEdit:
    """What is set for one photo.

    Attributes:
        crop: None: cropped like the others.
        caption: may contain placeholders; empty: captioned like the others.
        mask: name of a picture with a mask; empty: the photo's own transparency, if it has any.
    """

    crop: Square | None = None
    caption: str = ""
    mask: str = ""


def parse_edits(text: str) -> dict[str, PhotoEdit]:
    """Parse the edits, by name of the photo; an empty text gives none.

    Raises:
        SubjectBoothError: the text has another form, or a number is out of range.
    """
    if not text.strip():
        return {}
    try:
        values = json.loads(text)
    except (ValueError, RecursionError):
        raise _error("not valid JSON", EXAMPLE) from None
    if not isinstance(values, dict):
        raise _error("not an object", EXAMPLE)
    return {name: _parse_edit(name, value) for name, value in values.items()}


def edited(photo: Photo, edit: PhotoEdit, mask: Path | None = None, orientation: int = 1) -> Photo:
    """The photo with its mask and caption, cropped to its square.

    Args:
        photo: the photo, before cropping.
        edit: what is set for it.
        mask: the file that ``edit.mask`` names.
        orientation: EXIF orientation of the photo's file.

    Raises:
        SubjectBoothError: the mask cannot be read.
    """
    if mask is not None:
        photo = replace(photo, mask=read_mask(mask, photo, orientation))
    if edit.caption:
        photo = replace(photo, caption=edit.caption)
    if edit.crop is None:
        return photo
    height, width = photo.pixels.shape[:2]
    left, top, side = square_in(width, height, edit.crop)
    box = np.s_[top : top + side, left : left + side]
    inside = None if photo.mask is None else np.ascontiguousarray(photo.mask[box])
    return replace(photo, pixels=np.ascontiguousarray(photo.pixels[box]), mask=inside, is_cropped=True)


def read_mask(path: Path, photo: Photo, orientation: int = 1) -> np.ndarray | None:
    """The painted part of a picture, float32 [h, w] of the photo's size; None if nothing is painted.

    ComfyUI's mask editor shows a photo as it is stored, so what it writes has to be turned like the photo.

    Raises:
        SubjectBoothError: the file is missing or damaged, or not a picture of this photo.
    """
    height, width = photo.pixels.shape[:2]
    try:
        with Image.open(path, formats=("PNG", "WEBP")) as picture:
            check_size(picture.size, path.name)
            alpha = picture.convert("RGBA").getchannel("A")
        if path.name.startswith(EDITORS_NAME):
            alpha.getexif()[ORIENTATION] = orientation
            alpha = ImageOps.exif_transpose(alpha)
    except SubjectBoothError:
        raise
    except Exception as error:  # decoders raise almost anything on a damaged file
        raise SubjectBoothError(
            f"the mask of {photo.name} cannot be read ({path.name})",
            "a PNG of the mask editor",
            "paint it again, or remove the mask",
            NAME,
        ) from error
    if abs(alpha.width * height - alpha.height * width) > 0.02 * alpha.width * height:
        raise SubjectBoothError(
            f"the mask of {photo.name} is {alpha.width}x{alpha.height}, but the photo is {width}x{height}",
            "a mask of the same shape",
            "paint it again, or remove the mask",
            NAME,
        )
    if alpha.size != (width, height):
        alpha = alpha.resize((width, height), Image.Resampling.BILINEAR)
    painted = 1.0 - np.asarray(alpha, dtype=np.float32) / 255.0
    return painted if painted.any() else None


def square_in(width: int, height: int, crop: Square) -> tuple[int, int, int]:
    """Left, top and side of a square in pixels, inside a photo of this size."""
    x, y, size = crop
    side = min(max(1, round(size * min(width, height))), width, height)
    left = min(max(round(x * width - side / 2), 0), width - side)
    top = min(max(round(y * height - side / 2), 0), height - side)
    return left, top, side


def unused_note(edits: Mapping[str, PhotoEdit], names: Sequence[str]) -> list[str]:
    """A note about edits of photos that are not there."""
    unused = [name[:80] for name in edits if name not in names]
    if not unused:
        return []
    are = "is not among the photos, so its" if len(unused) == 1 else "are not among the photos, so their"
    return [f"{join_names(unused)} {are} entry in {NAME} is not used."]


def _parse_edit(name: str, value: Any) -> PhotoEdit:
    shown = name[:80]
    if not isinstance(value, dict) or not value.keys() <= {"crop", "caption", "mask"}:
        raise _error(f"{shown!r} has {_short(value)}", 'an object with "crop", "caption" or "mask"')
    mask = value.get("mask", "")
    if not isinstance(mask, str) or len(mask) > MAX_NAME:
        raise _error(f"the mask of {shown!r} is {_short(mask)}", "the name of a file")
    caption = value.get("caption", "")
    if not isinstance(caption, str) or len(caption) > MAX_LETTERS:
        given = f"{len(caption)} letters" if isinstance(caption, str) else _short(caption)
        raise _error(f"the caption of {shown!r} is {given}", f"a text of at most {MAX_LETTERS} letters")
    caption = " ".join(check_text(caption, f"the caption of {shown!r}").split())
    if not caption.isprintable():
        raise _error(f"the caption of {shown!r} contains a control character", "plain text")
    crop = value.get("crop")
    return PhotoEdit(None if crop is None else _parse_crop(shown, crop), caption, mask)


def _parse_crop(name: str, crop: Any) -> Square:
    needed = f"three numbers: the centre x and y from 0 to 1, and the side from {SMALLEST} to 1"
    is_three = isinstance(crop, list) and len(crop) == 3
    if not is_three or not all(isinstance(number, (int, float)) and not isinstance(number, bool) for number in crop):
        raise _error(f"the crop of {name!r} is {_short(crop)}", needed)
    x, y, size = crop
    if not (0 <= x <= 1 and 0 <= y <= 1 and SMALLEST <= size <= 1):  # which NaN is not either
        raise _error(f"the crop of {name!r} is {_short(crop)}", needed)
    return float(x), float(y), float(size)


def _short(value: Any) -> str:
    text = json.dumps(value, ensure_ascii=True)
    return text if len(text) <= 60 else text[:57] + "..."


def _error(given: str, needed: str) -> SubjectBoothError:
    return SubjectBoothError(f"{NAME}: {given}", needed, f"correct it, or clear {NAME}", NAME)
