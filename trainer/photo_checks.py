"""What spoils a run quietly: too few photos, too small ones, the same one twice, blurred ones."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

import numpy as np
from PIL import Image

if TYPE_CHECKING:
    from .subject import Photo

ENOUGH_PHOTOS = 3
_HASH_SIDE = 16
# Measured on six photographs: recompressed, rescaled and brightened copies differ in at most 7 of 256 bits,
# crops that keep 95 % of the picture in 25 and more (tests/test_subject.py).
_SAME_BITS = 16
_SAME_COLOUR = 16.0
_BLUR_SIDE = 512
_BLUR_TILES = 8
# Variance of the Laplacian, grey levels squared, in the sharpest tiles. The same six are at 1,200 to 3,300, at
# 50 to 330 under a Gaussian blur of 1 pixel, and below 9 under one of 4.
_BLURRED = 10.0


def check_photos(photos: Sequence[Photo], resolution: int) -> list[str]:
    """Warnings about a set of photos, each a sentence; empty when nothing is amiss.

    Args:
        photos: as they were read, before cropping.
        resolution: the training size in pixels.
    """
    warnings = []
    if len(photos) < ENOUGH_PHOTOS:
        count = f"{len(photos)} photo" + ("s" if len(photos) != 1 else "")
        warnings.append(
            f"Only {count}: with fewer than {ENOUGH_PHOTOS} the background and the pose are learned with the "
            "subject; 3 to 5 from different sides work best."
        )
    for photo in photos:
        height, width = photo.pixels.shape[:2]
        if min(height, width) < resolution:
            warnings.append(
                f"{photo.name} is {width}x{height}, smaller than the training size {resolution}: it is "
                "enlarged, and the subject becomes soft."
            )
    for first, second in equal_pairs([photo.pixels for photo in photos]):
        warnings.append(
            f"{photos[first].name} and {photos[second].name} are (nearly) the same picture: it counts "
            "twice and adds nothing."
        )
    for photo in photos:
        # An enlarged picture is soft in any case, and that was said above.
        if min(photo.pixels.shape[:2]) >= resolution and is_blurred(photo.pixels):
            warnings.append(f"{photo.name} looks blurred: the blur is learned with the subject.")
    return warnings


def equal_pairs(images: Sequence[np.ndarray]) -> list[tuple[int, int]]:
    """Index pairs of pictures that are copies of one another, however compressed or scaled.

    A difference hash (Krawetz, 2013) of 256 bits says whether the structure is the same, and a small colour
    thumbnail whether the colours are, so that one drawing before two backgrounds is two pictures.
    """
    hashes = [difference_hash(image) for image in images]
    colours = [_thumbnail(image, (8, 8), "RGB") for image in images]
    pairs = []
    for second in range(len(images)):
        for first in range(second):
            bits = int(np.count_nonzero(hashes[first] != hashes[second]))
            colour = float(np.abs(colours[first] - colours[second]).mean())
            if bits <= _SAME_BITS and colour <= _SAME_COLOUR:
                pairs.append((first, second))
    return sorted(pairs)


def difference_hash(image: np.ndarray) -> np.ndarray:
    """bool [16, 16]: is each cell of the grey thumbnail clearly brighter than its left neighbour?"""
    grey = _thumbnail(image, (_HASH_SIDE + 1, _HASH_SIDE), "L")
    # Two grey levels of slack: in flat areas the sign of a difference is a compressor's whim.
    return (grey[:, 1:] - grey[:, :-1]) > 2.0


def sharpness(image: np.ndarray) -> float:
    """Variance of the Laplacian in the sharpest tenth of the tiles, with the picture scaled to 512 pixels.

    Only the sharpest tiles count: a sharp subject before a soft background is a good photo.
    """
    height, width = image.shape[:2]
    scale = _BLUR_SIDE / min(height, width)
    size = (round(width * scale), round(height * scale)) if scale < 1 else (width, height)
    grey = _thumbnail(image, size, "L")
    laplacian = grey[:-2, 1:-1] + grey[2:, 1:-1] + grey[1:-1, :-2] + grey[1:-1, 2:] - 4.0 * grey[1:-1, 1:-1]
    tiles = [
        tile
        for row in np.array_split(laplacian, _BLUR_TILES, 0)
        for tile in np.array_split(row, _BLUR_TILES, 1)
    ]
    return float(np.quantile([tile.var() for tile in tiles if tile.size], 0.9))


def is_blurred(image: np.ndarray) -> bool:
    """Whether nothing in the picture is sharp. Errs on the side of silence."""
    return sharpness(image) < _BLURRED


def _thumbnail(image: np.ndarray, size: tuple[int, int], mode: str) -> np.ndarray:
    """float32 [h, w] or [h, w, 3]; ``size`` is (width, height)."""
    picture = Image.fromarray(image).convert(mode)
    if picture.size != size:
        picture = picture.resize(size, Image.Resampling.BOX if min(size) < 64 else Image.Resampling.LANCZOS)
    return np.asarray(picture, dtype=np.float32)
