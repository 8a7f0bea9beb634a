"""What spoils a run quietly: too few photos, too small ones, the same one twice, blurred ones."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from PIL import Image

from .notes import join_names
from .photo import Photo

ENOUGH_PHOTOS = 3
_HASH_SIDE = 16
# Measured on six photographs: recompressed, rescaled and brightened copies differ in at most 7 of 256 bits,
# crops that keep 95 % of the picture in 25 and more (tests/trainer/subject/test_subject.py).
_SAME_BITS = 16
_SAME_COLOUR = 16.0
_BLUR_SIDE = 512
_BLUR_TILES = 8
# Variance of the Laplacian, grey levels squared, in the sharpest tiles. The same six are at 1,200 to 3,300, at
# 50 to 330 under a Gaussian blur of 1 pixel, and below 9 under one of 4.
_BLURRED = 10.0


@dataclass(frozen=True)
class Finding:
    """Something that may spoil a run.

    Attributes:
        kind: "few", "small", "twice" or "blurred".
        text: a sentence.
        photos: numbers of the photos that it is about; empty when it is about the set.
    """

    kind: str
    text: str
    photos: tuple[int, ...] = ()


@dataclass(frozen=True)
class PhotoStats:
    """What the checks need to know of one photo, a few hundred bytes.

    Attributes:
        width, height: pixels.
        hash: bool [16, 16], from :func:`difference_hash`.
        colours: float32 [8, 8, 3], a thumbnail.
        blurred: whether nothing in it is sharp.
    """

    width: int
    height: int
    hash: np.ndarray
    colours: np.ndarray
    blurred: bool


def photo_stats(pixels: np.ndarray) -> PhotoStats:
    """Statistics of a photo uint8 [h, w, 3], as it was read."""
    height, width = pixels.shape[:2]
    return PhotoStats(width, height, difference_hash(pixels), _thumbnail(pixels, (8, 8), "RGB"), is_blurred(pixels))


def check_photos(photos: Sequence[Photo], resolution: int) -> list[str]:
    """Warnings about a set of photos, each a sentence; empty when nothing is amiss.

    Args:
        photos: as they were read, before cropping.
        resolution: the training size in pixels.
    """
    found = findings([photo.name for photo in photos], [photo_stats(photo.pixels) for photo in photos], resolution)
    return [finding.text for finding in found]


def findings(names: Sequence[str], looks: Sequence[PhotoStats], resolution: int) -> list[Finding]:
    """What there is to say about a set of photos, and of which of them it is said.

    Args:
        names: what to call them.
        looks: one a photo.
        resolution: the training size in pixels.
    """
    found = []
    if len(looks) < ENOUGH_PHOTOS:
        count = f"{len(looks)} photo" + ("s" if len(looks) != 1 else "")
        found.append(
            Finding(
                "few",
                f"Only {count}: with fewer than {ENOUGH_PHOTOS} the background and the pose are learned with the "
                "subject; 3 to 5 from different sides work best.",
            )
        )
    small = [index for index, look in enumerate(looks) if min(look.height, look.width) < resolution]
    found += _about("small", small, _small(names, looks, small, resolution))
    for group in duplicate_groups(looks):
        found += _about("twice", group, _twice([names[index] for index in group]))
    # An enlarged picture is soft in any case, and that was said above.
    soft = [index for index, look in enumerate(looks) if index not in small and look.blurred]
    verb = "looks" if len(soft) == 1 else "look"
    found += _about(
        "blurred",
        soft,
        f"{join_names([names[index] for index in soft])} {verb} blurred: the blur is learned with the subject.",
    )
    return found


def _about(kind: str, photos: Sequence[int], text: str) -> list[Finding]:
    """One finding about all of these photos, none when there are none."""
    return [Finding(kind, text, tuple(photos))] if photos else []


def _small(names: Sequence[str], looks: Sequence[PhotoStats], photos: Sequence[int], resolution: int) -> str:
    if len(photos) == 1:
        look = looks[photos[0]]
        return (
            f"{names[photos[0]]} is {look.width}x{look.height}, smaller than the training size {resolution}: it is "
            "enlarged, and the subject becomes soft."
        )
    sizes = [f"{names[index]} ({looks[index].width}x{looks[index].height})" for index in photos]
    return (
        f"{join_names(sizes)} are smaller than the training size {resolution}: they are enlarged, and the subject "
        "becomes soft."
    )


def _twice(names: Sequence[str]) -> str:
    if len(names) == 2:
        return f"{join_names(names)} are (nearly) the same picture: it counts twice and adds nothing."
    return (
        f"{len(names)} photos are (nearly) the same picture: {join_names(names)}. It counts {len(names)} times and adds "
        "nothing."
    )


def duplicate_groups(looks: Sequence[PhotoStats]) -> list[list[int]]:
    """Groups of two or more photos of which each is a copy of another one of its group, by number.

    Frames of a film are one group, though its first and last may differ. Hundreds of photos make tens of thousands of
    pairs, so a photo is only compared with those that are not yet in its group.
    """
    group_of = np.arange(len(looks))
    for first in range(len(looks)):
        others = np.flatnonzero(group_of != group_of[first])
        others = others[others > first]
        copies = others[_are_copies(looks[first], [looks[int(index)] for index in others])]
        group_of[np.isin(group_of, group_of[copies])] = group_of[first]
    return [
        np.flatnonzero(group_of == group).tolist()
        for group, first in sorted(
            zip(*np.unique(group_of, return_index=True), strict=True), key=lambda found: found[1]
        )
        if np.count_nonzero(group_of == group) > 1
    ]


def _are_copies(look: PhotoStats, others: Sequence[PhotoStats]) -> np.ndarray:
    """bool [n]: which of the others are copies of it, however compressed or scaled?

    A difference hash (Krawetz, 2013) of 256 bits says whether the structure is the same, and a small colour
    thumbnail whether the colours are, so that one drawing before two backgrounds is two pictures.
    """
    if not others:
        return np.zeros(0, dtype=bool)
    bits = np.count_nonzero(np.stack([other.hash for other in others]) != look.hash, axis=(1, 2))
    colour = np.abs(np.stack([other.colours for other in others]) - look.colours).mean(axis=(1, 2, 3))
    return (bits <= _SAME_BITS) & (colour <= _SAME_COLOUR)


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
    tiles = [tile for row in np.array_split(laplacian, _BLUR_TILES, 0) for tile in np.array_split(row, _BLUR_TILES, 1)]
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
