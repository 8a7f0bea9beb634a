"""The figures of a grid: a row for each run, and a summary over seeds, as Markdown and CSV."""

from __future__ import annotations

import csv
import io
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from statistics import mean, stdev

from .executor import Outcome
from .jobs import Point
from .records import Record, Records


@dataclass(frozen=True)
class Row:
    """A point of the grid with what was measured there.

    Attributes:
        record: None if the run failed.
        problem: why it failed; empty if it did not.
    """

    point: Point
    record: Record | None
    problem: str = ""


@dataclass(frozen=True)
class Cell:
    """A figure over the seeds."""

    values: tuple[float, ...]

    @property
    def mean(self) -> float:
        return mean(self.values)

    @property
    def spread(self) -> float:
        """The standard deviation over the seeds; 0 for a single one."""
        return stdev(self.values) if len(self.values) > 1 else 0.0

    def __str__(self) -> str:
        return f"{self.mean:.3f} ± {self.spread:.3f}" if len(self.values) > 1 else f"{self.mean:.3f}"


Group = tuple[tuple[str, ...], list[Row]]
"""The labels on all axes, and the rows of all seeds."""


def collect(points: Sequence[Point], outcomes: Mapping[str, Outcome], records: Records) -> list[Row]:
    """The rows of all points."""
    rows = []
    for point in points:
        outcome = outcomes.get(point.job, Outcome(point.job, problem="not run"))
        name = outcome.records.get(point.steps)
        record = records.read(name) if name is not None else None
        rows.append(Row(point, record, "" if record is not None else outcome.problem or "its record is damaged"))
    return rows


def groups_of(rows: Sequence[Row]) -> list[Group]:
    """The rows by labels, in the order of the grid."""
    found: dict[tuple[str, ...], list[Row]] = {}
    for row in rows:
        found.setdefault(row.point.labels, []).append(row)
    return list(found.items())


def cell(rows: Sequence[Row], figure: str) -> Cell | None:
    """A figure over the rows that have it; None if none does."""
    values = [row.record.figures[figure] for row in rows if row.record is not None and figure in row.record.figures]
    return Cell(tuple(values)) if values else None


def measured(rows: Sequence[Row], figures: Sequence[str]) -> list[str]:
    """Those of the figures that any run has."""
    return [figure for figure in figures if cell(rows, figure) is not None]


def markdown(axes: Sequence[str], rows: Sequence[Row], figures: Sequence[str]) -> str:
    """A row for each combination of labels: mean and standard deviation over the seeds, and the number of runs."""
    lines = [f"| {' | '.join([*axes, *figures, 'runs'])} |", "|" + "---|" * (len(axes) + len(figures) + 1)]
    for labels, group in groups_of(rows):
        cells = [cell(group, figure) for figure in figures]
        done = sum(row.record is not None for row in group)
        shown = [str(found) if found is not None else "–" for found in cells]
        count = str(done) if done == len(group) else f"{done} of {len(group)}"
        lines.append(f"| {' | '.join([*map(escaped, labels), *shown, count])} |")
    return "\n".join(lines)


def as_csv(axes: Sequence[str], rows: Sequence[Row], figures: Sequence[str]) -> str:
    """A line for each run, with unrounded figures, its folder and its key."""
    text = io.StringIO()
    writer = csv.writer(text, lineterminator="\n")
    about_steps = ["used step"] if "steps" in axes else ["steps", "used step"]
    writer.writerow([*axes, "seed", *about_steps, *figures, "run", "key", "problem"])
    for row in rows:
        record, point = row.record, row.point
        values = [record.figures.get(figure, "") if record else "" for figure in figures]
        about = [record.run, record.key] if record else ["", ""]
        steps = [point.steps, record.step if record else ""][-len(about_steps) :]
        writer.writerow([*point.labels, point.seed, *steps, *values, *about, row.problem])
    return text.getvalue()


def escaped(text: str) -> str:
    """Text for a cell of a Markdown table."""
    return text.replace("\\", "\\\\").replace("|", "\\|").replace("\n", " ")
