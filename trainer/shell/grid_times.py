"""How long the runs of a grid took. Not part of its page, which has the same bytes whenever it is made."""

from __future__ import annotations

import json
import statistics
from collections.abc import Mapping, Sequence
from contextlib import suppress
from pathlib import Path

from ..events import StepDone
from ..experiment.executor import Outcome
from ..experiment.jobs import Point
from ..experiment.records import Records
from ..experiment.table import escaped
from ..files.storage import write_atomic
from ..runs.log import read_entries

SECONDS_FILE = "seconds.json"
LOG = "events.jsonl"


def add_seconds(folder: Path, steps: int, seconds: float) -> None:
    """Add to the time that a run took up to ``steps``. Only for the table of times, so a failure is ignored."""
    values = _read_seconds(folder)
    values[steps] = values.get(steps, 0.0) + seconds
    with suppress(OSError):
        write_atomic(folder / SECONDS_FILE, json.dumps(values))


def times(
    axes: Sequence[str], points: Sequence[Point], outcomes: Mapping[str, Outcome], records: Records, runs: Path
) -> str:
    """A table in Markdown: for each run the median step, all its steps, and everything, in seconds.

    Everything includes encoding, studying the base, scores, validation images, and what a kill has cost; not the
    pictures of the page and its figures.
    """
    head = [*axes, "seed", *(() if "steps" in axes else ("steps",)), "a step (s)", "all steps (s)", "the run (s)"]
    lines = ["# Times", "", f"| {' | '.join(head)} |", "|" + "---|" * len(head)]
    for point in points:
        outcome = outcomes.get(point.job)
        record = records.read(outcome.records.get(point.steps, "")) if outcome else None
        if record is None:
            continue
        folder = runs / record.run
        with suppress(OSError):
            done = [entry for entry in read_entries(folder / LOG) if entry["event"] == StepDone.__name__]
            taken = [entry["seconds"] for entry in done if entry["step"] <= point.steps and "seconds" in entry]
            whole = sum(value for steps, value in _read_seconds(folder).items() if steps <= point.steps)
            if taken:
                figures = [f"{statistics.median(taken):.3f}", f"{sum(taken):.1f}", f"{whole:.1f}"]
                about = [
                    *map(escaped, point.labels),
                    str(point.seed),
                    *(() if "steps" in axes else (str(point.steps),)),
                ]
                lines.append(f"| {' | '.join([*about, *figures])} |")
    return "\n".join(lines) + "\n"


def _read_seconds(folder: Path) -> dict[int, float]:
    try:
        values = json.loads((folder / SECONDS_FILE).read_text("utf-8"))
        return {int(steps): float(seconds) for steps, seconds in values.items()}
    except (OSError, ValueError, AttributeError, TypeError):
        return {}
