"""The table of a batch: a row for each subject, written again while they are trained."""

from __future__ import annotations

import csv
import io
import time
from collections.abc import Sequence
from pathlib import Path

from ..experiment.executor import Outcome
from ..files.storage import disk_errors, write_atomic
from ..runs.mirror import Mirror

TABLE = "batch.csv"
"""Its name, in the output folder."""

COLUMNS = ("name", "status", "step", "lora", "problem")
WAITING, TRAINED, FAILED = "waiting", "trained", "failed"

REFRESH = 5.0
"""Seconds between two versions. With 10,000 rows, one is about a megabyte."""


class BatchTable:
    """Writes the table.

    Args:
        path: of the file.
        jobs: key and name of each subject.
        mirror: where it is copied to.

    Raises:
        SubjectBoothError: from any method, if it cannot be written.
    """

    def __init__(self, path: Path, jobs: Sequence[tuple[str, str]], mirror: Mirror | None = None) -> None:
        self._path, self._mirror = path, mirror
        self._rows: dict[str, tuple[object, ...]] = {key: (name, WAITING, "", "", "") for key, name in jobs}
        self.write()

    def show(self, job: str, text: str) -> None:
        """Set the status of a subject."""
        self._set(job, (text, "", "", ""))

    def finish(self, outcome: Outcome) -> None:
        """Enter what became of a subject."""
        step, lora = next(iter(outcome.records.items()), ("", ""))
        self._set(outcome.job, (FAILED if outcome.problem else TRAINED, step, lora, outcome.problem))

    def write(self) -> None:
        """Write all rows."""
        text = io.StringIO()
        writer = csv.writer(text, lineterminator="\n")
        writer.writerows([COLUMNS, *self._rows.values()])
        with disk_errors("the table of subjects cannot be written", self._path.parent):
            write_atomic(self._path, text.getvalue())
        if self._mirror:
            self._mirror.push(self._path)
        self._written = time.monotonic()

    def _set(self, job: str, values: tuple[object, ...]) -> None:
        self._rows[job] = (self._rows[job][0], *values)
        if time.monotonic() - self._written >= REFRESH:
            self.write()
