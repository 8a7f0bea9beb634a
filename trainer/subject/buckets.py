"""Aspect-ratio buckets: sizes of about the same area in several shapes, so that a photo need not become a square.

As in NovelAI's aspect ratio bucketing (2022) and sd-scripts' ``enable_bucket``, which ``ss_bucket_info`` comes from.
"""

from __future__ import annotations

import math

STEP = 64
"""Pixels between two bucket sides: the UNet halves its latents (8 pixels each) three times."""
SMALL, SMALL_STEP = 256, 8
"""Below 256 pixels steps of 64 would leave next to no shapes: there sides are multiples of 8, and the UNet pads."""


def bucket_sizes(resolution: int) -> list[tuple[int, int]]:
    """Widths and heights with at most ``resolution`` squared pixels; sides from a half to twice the resolution.

    The square of the resolution itself is always among them, so that square photos are what they are without buckets.
    """
    step = STEP if resolution >= SMALL else SMALL_STEP
    found = {(resolution, resolution)}
    for side in range(math.ceil(resolution / 2 / step) * step, 2 * resolution + 1, step):
        other = min(resolution**2 // side, 2 * resolution) // step * step
        if 2 * other >= resolution and other != side:
            found |= {(side, other), (other, side)}
    return sorted(found)


def nearest_bucket(width: int, height: int, resolution: int) -> tuple[int, int]:
    """The bucket whose shape is the nearest to a photo's, by the ratio of the two aspect ratios.

    Among equally near ones the one with the most pixels.
    """
    aspect = math.log(width / height)
    return min(
        bucket_sizes(resolution),
        key=lambda size: (round(abs(math.log(size[0] / size[1]) - aspect), 9), -size[0] * size[1]),
    )
