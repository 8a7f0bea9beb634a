"""Judging a run while it goes on."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Protocol

from ..events import Event


class Evaluator(Protocol):
    """Turns what a run tells into scores, such as how much its validation pictures look like the subject.

    It only looks: nothing that it does may change the run, and its scores are no part of the run's key.
    """

    def scores(self, event: Event) -> Mapping[str, float]:
        """
        Args:
            event: any of the run's but Finished; most are of no interest.

        Returns:
            numbers by name, for the log and the trackers; empty where there is nothing to say.
        """
        ...
