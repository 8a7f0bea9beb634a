"""Estimates the time left."""

from __future__ import annotations

from collections import deque


class Clock:
    """Seconds per step, averaged over the last steps, and the time left."""

    def __init__(self) -> None:
        self._recent: deque[float] = deque(maxlen=20)
        self._first = True
        self.validation = 0.0

    def step(self, seconds: float) -> float:
        # The first step includes warm-up and would distort the estimate.
        if not self._first:
            self._recent.append(seconds)
        self._first = False
        return seconds

    def eta(self, steps: int, validations: int) -> float | None:
        if not self._recent:
            return None
        return steps * sum(self._recent) / len(self._recent) + validations * self.validation
