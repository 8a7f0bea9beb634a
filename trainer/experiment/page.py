"""The page of a grid: README.md with its table, pictures and curves, and runs.csv. The same records, the same bytes."""

from __future__ import annotations

import io
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from ..files.storage import disk_errors, write_atomic
from .curves import Curve, curves, dots
from .executor import Outcome
from .figures import MEANINGS
from .jobs import Job, Point
from .records import Records
from .sheets import Sheet, sheets
from .spec import Axis, Spec
from .table import Row, as_csv, cell, collect, groups_of, markdown, measured

PAGE, RUNS, CURVES, TIMES = "README.md", "runs.csv", "curves.svg", "times.md"


@dataclass(frozen=True)
class Page:
    """A finished page, from which trackers log too."""

    text: str
    rows: Sequence[Row]
    figures: Sequence[str]
    sheets: Sequence[Sheet]
    csv: str
    chart: str


def make_page(
    spec: Spec, points: Sequence[Point], jobs: Sequence[Job], outcomes: Mapping[str, Outcome], records: Records
) -> Page:
    """Put the page together from what was measured."""
    rows = collect(points, outcomes, records)
    axes = [axis.name for axis in spec.axes]
    figures = measured(rows, spec.measuring.figures)
    pictures = sheets(axes, rows, spec.measuring.prompts, spec.seeds[0])
    chart = _chart(spec.axes, rows, figures)
    table = as_csv(axes, rows, figures)
    return Page(_text(spec, jobs, rows, figures, pictures, chart), rows, figures, pictures, table, chart)


def write_page(page: Page, folder: Path) -> None:
    """Write the page's files.

    Raises:
        SubjectBoothError: a file cannot be written.
    """
    with disk_errors("the page of the experiment cannot be written", folder):
        write_atomic(folder / PAGE, page.text)
        write_atomic(folder / RUNS, page.csv)
        if page.chart:
            write_atomic(folder / CURVES, page.chart)
        for number, sheet in enumerate(page.sheets, 1):
            content = io.BytesIO()
            sheet.image.save(content, "PNG", optimize=True)
            write_atomic(folder / _sheet_file(number), content.getvalue())


def _text(
    spec: Spec, jobs: Sequence[Job], rows: Sequence[Row], figures: Sequence[str], pictures: Sequence[Sheet], chart: str
) -> str:
    names = {job.key: job.name for job in jobs}
    parts = [f"# {spec.title}"]
    parts += [text for text in (spec.question, spec.answer) if text]
    failed = [row for row in rows if row.record is None]
    if failed:
        whole = dict.fromkeys((names[row.point.job], row.problem) for row in failed)
        lines = [f"- **{name}**: {problem}" for name, problem in whole]
        parts.append("\n".join([f"**{len(whole)} of {len(jobs)} runs failed:**", "", *lines]))
    count = len(spec.seeds)
    about = f"Mean and standard deviation over {count} training seeds" if count > 1 else "One training seed"
    if figures:
        parts.append(markdown([axis.name for axis in spec.axes], rows, figures))
        parts.append("\n".join(f"- `{figure}`: {MEANINGS[figure]}" for figure in figures))
        parts.append(f"{about}. Every run: [{RUNS}]({RUNS}). Times: [{TIMES}]({TIMES}).")
    missing = [figure for figure in spec.measuring.figures if figure not in figures]
    notes = list(dict.fromkeys(note for row in rows if row.record for note in row.record.notes))
    if missing and not notes:
        notes = ["No run has them."]
    if missing:
        parts.append(f"Left out: {', '.join(missing)}. {' '.join(notes)}")
    if chart:
        parts.append(f"![Figures]({CURVES})")
    for number, sheet in enumerate(pictures, 1):
        parts.append(f"## {sheet.title}\n\n![{sheet.title}]({_sheet_file(number)})")
    return "\n\n".join(parts) + "\n"


def _chart(axes: Sequence[Axis], rows: Sequence[Row], figures: Sequence[str]) -> str:
    """Curves along the steps or another axis of numbers; dots without one."""
    if not figures:
        return ""
    groups = groups_of(rows)
    along = _numeric(axes)
    if along is None:
        names = [", ".join(labels) for labels, _ in groups]
        return dots([(figure, [cell(group, figure) for _, group in groups]) for figure in figures], names)
    charts = []
    for figure in figures:
        found: dict[str, list[tuple[float, list[Row]]]] = {}
        for labels, group in groups:
            name = ", ".join(label for number, label in enumerate(labels) if number != along)
            found.setdefault(name, []).append((float(labels[along]), group))
        shown = []
        for name, points in found.items():
            cells = [(x, at) for x, group in sorted(points, key=lambda p: p[0]) if (at := cell(group, figure))]
            shown.append(Curve(name, cells))
        if any(curve.points for curve in shown):
            charts.append((figure, shown))
    return curves(charts, axes[along].name)


def _numeric(axes: Sequence[Axis]) -> int | None:
    """The first axis of three numbers or more, steps before others."""

    def is_numeric(axis: Axis) -> bool:
        values = [value for variant in axis.variants.values() for value in variant.values()]
        return (
            len(axis.variants) > 2
            and all(isinstance(value, (int, float)) and not isinstance(value, bool) for value in values)
            and axis.options == {axis.name}
        )

    found = [number for number, axis in enumerate(axes) if is_numeric(axis)]
    return min(found, key=lambda number: axes[number].name != "steps", default=None)


def _sheet_file(number: int) -> str:
    return f"pictures-{number}.png"
