"""The interface for scoring a run during training."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Protocol

from ..events import Event


class Evaluator(Protocol):
    """Computes scores from the events of a run, such as the similarity of validation images to the subject.

    An evaluator must not affect the run, and its scores are not part of the run's key.
    """

    def scores(self, event: Event) -> Mapping[str, float]:
        """Score an event.

        Args:
            event: any event of the run except Scores and Finished; most can be ignored.

        Returns:
            scores by name, for the log and the trackers; may be empty.
        """
        ...
