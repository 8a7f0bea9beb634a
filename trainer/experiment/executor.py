"""Who carries out the runs of a grid. Here: this process, in order; another executor may send them elsewhere.

A job consists of JSON values, and everything it produces is in files, so jobs can run in any process that reaches the
output folder. A run's folder is locked while it is trained.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Protocol

from ..errors import SubjectBoothError
from .jobs import Job

logger = logging.getLogger("subjectbooth")


@dataclass(frozen=True)
class Outcome:
    """What became of a job.

    Attributes:
        records: names of the records (:mod:`trainer.experiment.records`) by steps.
        problem: why it failed; empty if it did not. What was measured before is in ``records``.
    """

    job: str
    records: Mapping[int, str] = field(default_factory=dict)
    problem: str = ""


CarryOut = Callable[[Job, dict[int, str]], None]
"""Trains and measures a job; adds the name of each record to the dictionary, by steps."""


class Executor(Protocol):
    """Carries out jobs and yields their outcomes, in any order. A failed job must not end the others."""

    def __call__(self, jobs: Sequence[Job], carry_out: CarryOut) -> Iterator[Outcome]: ...


def in_order(jobs: Sequence[Job], carry_out: CarryOut) -> Iterator[Outcome]:
    """One job after the other, in this process."""
    for job in jobs:
        records: dict[int, str] = {}
        try:
            carry_out(job, records)
        except SubjectBoothError as error:
            yield Outcome(job.key, records, str(error))
        except Exception as error:
            logger.exception("%s failed", job.name)
            yield Outcome(job.key, records, f"{type(error).__name__}: {error}")
        else:
            yield Outcome(job.key, records)
