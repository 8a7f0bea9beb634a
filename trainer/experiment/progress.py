"""How far a grid is, and how long it still takes: from the time of its own steps and pictures so far."""

from __future__ import annotations

from dataclasses import dataclass, field


@dataclass
class Work:
    """Work of one kind.

    Attributes:
        left: how much is left.
        timed, seconds: how much was done in this program, and the time that it took. What was found done is not timed.
    """

    left: int = 0
    timed: int = 0
    seconds: float = 0.0

    @property
    def seconds_left(self) -> float | None:
        """None if nothing was timed yet."""
        if not self.left:
            return 0.0
        return self.left * self.seconds / self.timed if self.timed else None


@dataclass
class Progress:
    """The steps and the measurements of a grid."""

    steps: Work = field(default_factory=Work)
    measurements: Work = field(default_factory=Work)

    def found(self, work: Work, amount: int) -> None:
        """So much was there already, or is given up."""
        work.left = max(0, work.left - amount)

    def did(self, work: Work, amount: int, seconds: float) -> None:
        """So much was done in so many seconds."""
        self.found(work, amount)
        work.timed += amount
        work.seconds += seconds

    @property
    def remaining(self) -> str:
        """The remaining time in words; empty if it is not known yet."""
        parts = [self.steps.seconds_left, self.measurements.seconds_left]
        known = [part for part in parts if part is not None]
        if not any(known) or (parts[0] is None and self.steps.left):
            return ""
        minutes = sum(known) / 60
        if minutes < 1:
            return "under a minute left" if None not in parts else ""
        shown = f"{minutes:.0f} min" if minutes < 90 else f"{minutes / 60:.1f} h"
        return f"about {shown} left" if None not in parts else f"more than {shown} left"
