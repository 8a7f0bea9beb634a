"""The learning rate's course that every training of the demo base follows."""

from __future__ import annotations

import math


def warm_cosine(step: int, progress: float, warmup: int = 100, floor: float = 0.0) -> float:
    """Share of the highest rate: linear over *warmup* steps, then half a cosine down to *floor*.

    *progress* is 0..1: by steps, or by time on a shared machine.
    """
    cosine = 0.5 * (1 + math.cos(math.pi * progress))
    return min(1.0, (step + 1) / warmup) * (floor + (1 - floor) * cosine)
