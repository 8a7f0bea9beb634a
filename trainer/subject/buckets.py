"""Aspect-ratio bucketing: image sizes of about the same area but different shapes, so that photos need not be square.

After NovelAI's aspect ratio bucketing (2022) and sd-scripts' ``enable_bucket``, the source of ``ss_bucket_info``.
"""

from __future__ import annotations

import math

STEP = 64
"""Bucket sides are multiples of this many pixels: the UNet halves its latents (8 pixels each) three times."""
SMALL, SMALL_STEP = 256, 8
"""Below 256 pixels, steps of 64 would leave almost no shapes, so sides are multiples of 8, and the UNet pads."""


def bucket_sizes(resolution: int) -> list[tuple[int, int]]:
    """(width, height) pairs with at most ``resolution`` squared pixels and sides of 1/2 to 2 times the resolution.

    The square of the resolution is always included, so that square photos are the same with and without buckets.
    """
    step = STEP if resolution >= SMALL else SMALL_STEP
    found = {(resolution, resolution)}
    for side in range(math.ceil(resolution / 2 / step) * step, 2 * resolution + 1, step):
        other = min(resolution**2 // side, 2 * resolution) // step * step
        if 2 * other >= resolution and other != side:
            found |= {(side, other), (other, side)}
    return sorted(found)


def nearest_bucket(width: int, height: int, resolution: int) -> tuple[int, int]:
    """The (width, height) of the bucket closest to a photo's shape, by the ratio of the aspect ratios.

    Ties go to the bucket with the most pixels.
    """
    aspect = math.log(width / height)
    return min(
        bucket_sizes(resolution),
        key=lambda size: (round(abs(math.log(size[0] / size[1]) - aspect), 9), -size[0] * size[1]),
    )
