"""The learning rate schedule of all trainings of the demo base."""

from __future__ import annotations

import math


def warm_cosine(step: int, progress: float, warmup: int = 100, floor: float = 0.0) -> float:
    """Fraction of the peak learning rate: linear warm-up over *warmup* steps, cosine decay to *floor*.

    *progress* is 0..1, by steps or by time.
    """
    cosine = 0.5 * (1 + math.cos(math.pi * progress))
    return min(1.0, (step + 1) / warmup) * (floor + (1 - floor) * cosine)
