"""Warnings about problems with photos: too few, too small, duplicates or blurred."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from PIL import Image

from .notes import join_names
from .photo import Photo

ENOUGH_PHOTOS = 3
_HASH_SIDE = 16
# Measured on six photos: recompressed, rescaled and brightened copies differ in at most 7 of 256 bits, crops that keep
# 95 % of the image in 25 or more (tests/trainer/subject/test_subject.py).
_MAX_HASH_DISTANCE = 16
_MAX_COLOUR_DISTANCE = 16.0
_BLUR_SIDE = 512
_BLUR_TILES = 8
# Variance of the Laplacian in the sharpest tiles, in grey levels squared. The same six photos: 1,200 to 3,300; with a
# Gaussian blur of 1 pixel, 50 to 330; with one of 4 pixels, below 9.
_BLURRED_BELOW = 10.0


@dataclass(frozen=True)
class Finding:
    """A warning about one or more photos.

    Attributes:
        kind: "few", "small", "twice" or "blurred".
        text: a sentence.
        photos: indices of the photos concerned; empty if it concerns the whole set.
    """

    kind: str
    text: str
    photos: tuple[int, ...] = ()


@dataclass(frozen=True)
class PhotoStats:
    """What the checks need to know about one photo, a few hundred bytes.

    Attributes:
        width, height: pixels.
        hash: bool [16, 16], from :func:`difference_hash`.
        colours: float32 [8, 8, 3], a thumbnail.
        blurred: whether no part of it is sharp.
    """

    width: int
    height: int
    hash: np.ndarray
    colours: np.ndarray
    blurred: bool


def photo_stats(pixels: np.ndarray) -> PhotoStats:
    """Compute the statistics of a photo, uint8 [h, w, 3], before cropping."""
    height, width = pixels.shape[:2]
    return PhotoStats(width, height, difference_hash(pixels), _thumbnail(pixels, (8, 8), "RGB"), is_blurred(pixels))


def check_photos(photos: Sequence[Photo], resolution: int) -> list[str]:
    """Warnings about a set of photos, one sentence each; empty if there are none.

    Args:
        photos: before cropping.
        resolution: the training size in pixels.
    """
    found = findings([photo.name for photo in photos], [photo_stats(photo.pixels) for photo in photos], resolution)
    return [finding.text for finding in found]


def findings(names: Sequence[str], stats: Sequence[PhotoStats], resolution: int) -> list[Finding]:
    """Warnings about a set of photos, with the photos that each one concerns.

    Args:
        names: the photos' names, for the messages.
        stats: one per photo.
        resolution: the training size in pixels.
    """
    found = []
    if len(stats) < ENOUGH_PHOTOS:
        count = f"{len(stats)} photo" + ("s" if len(stats) != 1 else "")
        found.append(
            Finding(
                "few",
                f"Only {count}: with fewer than {ENOUGH_PHOTOS}, the background and the pose are learned with the "
                "subject. 3 to 5 photos from different angles work best.",
            )
        )
    small = [index for index, photo in enumerate(stats) if min(photo.height, photo.width) < resolution]
    found += _finding("small", small, _small_text(names, stats, small, resolution))
    for group in duplicate_groups(stats):
        found += _finding("twice", group, _duplicates_text([names[index] for index in group]))
    # Enlarged photos are always soft, and the warning about their size says so.
    blurred = [index for index, photo in enumerate(stats) if index not in small and photo.blurred]
    verb = "looks" if len(blurred) == 1 else "look"
    found += _finding(
        "blurred",
        blurred,
        f"{join_names([names[index] for index in blurred])} {verb} blurred: the blur is learned with the subject.",
    )
    return found


def _finding(kind: str, photos: Sequence[int], text: str) -> list[Finding]:
    """One finding about these photos, or none if the list is empty."""
    return [Finding(kind, text, tuple(photos))] if photos else []


def _small_text(names: Sequence[str], stats: Sequence[PhotoStats], photos: Sequence[int], resolution: int) -> str:
    if len(photos) == 1:
        photo = stats[photos[0]]
        return (
            f"{names[photos[0]]} is {photo.width}x{photo.height}, smaller than the training size {resolution}: it is "
            "enlarged, and the subject becomes soft."
        )
    sizes = [f"{names[index]} ({stats[index].width}x{stats[index].height})" for index in photos]
    return (
        f"{join_names(sizes)} are smaller than the training size {resolution}: they are enlarged, and the subject "
        "becomes soft."
    )


def _duplicates_text(names: Sequence[str]) -> str:
    if len(names) == 2:
        return f"{join_names(names)} are near-duplicates: this view gets double weight."
    return (
        f"{len(names)} photos are near-duplicates: {join_names(names)}. This view gets {len(names)} times the weight."
    )


def duplicate_groups(stats: Sequence[PhotoStats]) -> list[list[int]]:
    """Groups, by index, of two or more photos in which each is a copy of another one.

    Video frames are one group, although the first and the last may differ. Hundreds of photos make tens of thousands of
    pairs, so a photo is only compared with those not yet in its group.
    """
    group_of = np.arange(len(stats))
    for first in range(len(stats)):
        others = np.flatnonzero(group_of != group_of[first])
        others = others[others > first]
        copies = others[_are_copies(stats[first], [stats[int(index)] for index in others])]
        group_of[np.isin(group_of, group_of[copies])] = group_of[first]
    return [
        np.flatnonzero(group_of == group).tolist()
        for group, first in sorted(
            zip(*np.unique(group_of, return_index=True), strict=True), key=lambda found: found[1]
        )
        if np.count_nonzero(group_of == group) > 1
    ]


def _are_copies(photo: PhotoStats, others: Sequence[PhotoStats]) -> np.ndarray:
    """bool [n]: which of the others are copies of the photo, however compressed or scaled.

    A difference hash (Krawetz, 2013) of 256 bits compares the structure, and a small thumbnail the colours, so that
    the same drawing on two backgrounds counts as two images.
    """
    if not others:
        return np.zeros(0, dtype=bool)
    bits = np.count_nonzero(np.stack([other.hash for other in others]) != photo.hash, axis=(1, 2))
    colour = np.abs(np.stack([other.colours for other in others]) - photo.colours).mean(axis=(1, 2, 3))
    return (bits <= _MAX_HASH_DISTANCE) & (colour <= _MAX_COLOUR_DISTANCE)


def difference_hash(image: np.ndarray) -> np.ndarray:
    """bool [16, 16]: whether each cell of the grey thumbnail is clearly brighter than its left neighbour."""
    grey = _thumbnail(image, (_HASH_SIDE + 1, _HASH_SIDE), "L")
    # Two grey levels of tolerance: in flat areas, the sign of a difference is compression noise.
    return (grey[:, 1:] - grey[:, :-1]) > 2.0


def sharpness(image: np.ndarray) -> float:
    """Variance of the Laplacian in the sharpest tenth of the tiles, with the image scaled down to 512 pixels.

    Only the sharpest tiles count, because a sharp subject on a soft background is a good photo.
    """
    height, width = image.shape[:2]
    scale = _BLUR_SIDE / min(height, width)
    size = (round(width * scale), round(height * scale)) if scale < 1 else (width, height)
    grey = _thumbnail(image, size, "L")
    laplacian = grey[:-2, 1:-1] + grey[2:, 1:-1] + grey[1:-1, :-2] + grey[1:-1, 2:] - 4.0 * grey[1:-1, 1:-1]
    tiles = [tile for row in np.array_split(laplacian, _BLUR_TILES, 0) for tile in np.array_split(row, _BLUR_TILES, 1)]
    return float(np.quantile([tile.var() for tile in tiles if tile.size], 0.9))


def is_blurred(image: np.ndarray) -> bool:
    """Whether no part of the image is sharp. Prefers missing a blurred photo to a false warning."""
    return sharpness(image) < _BLURRED_BELOW


def _thumbnail(image: np.ndarray, size: tuple[int, int], mode: str) -> np.ndarray:
    """float32 [h, w] or [h, w, 3]; ``size`` is (width, height)."""
    picture = Image.fromarray(image).convert(mode)
    if picture.size != size:
        picture = picture.resize(size, Image.Resampling.BOX if min(size) < 64 else Image.Resampling.LANCZOS)
    return np.asarray(picture, dtype=np.float32)
