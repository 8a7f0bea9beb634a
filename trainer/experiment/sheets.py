"""The pictures of a grid as labelled tables: one axis by the prompts, or axis by axis for each prompt."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from PIL import Image

from ..files.labelled_grid import labelled_grid
from .table import Row, groups_of

MOST_SHEETS = 12
"""Tables on a page; a grid with more has too many axes to look at."""

BASE = "before"
"""Label of the row without training."""


Labels = tuple[str, ...]
Pictures = Mapping[Labels, Sequence[Image.Image]]
"""By labels: a picture for each prompt, then those of the base."""


@dataclass(frozen=True)
class Sheet:
    """A table of pictures."""

    title: str
    image: Image.Image


def sheets(axes: Sequence[str], rows: Sequence[Row], prompts: Sequence[str], seed: int) -> list[Sheet]:
    """The tables of one training seed.

    Args:
        axes: names; the first two with several values become rows and columns.
        rows: all rows of the grid.
        prompts: as they were written, with their placeholders.
        seed: whose runs are shown.
    """
    labels = [labels for labels, _ in groups_of(rows)]
    pictures = {
        row.point.labels: _opened(row.record.pictures)
        for row in rows
        if row.point.seed == seed and row.record is not None and row.record.pictures
    }
    varied = [number for number in range(len(axes)) if len({label[number] for label in labels}) > 1]
    if not pictures:
        return []
    if len(varied) < 2:
        return [_by_prompt(axes, labels, pictures, prompts, varied[0] if varied else 0)]
    return _axis_by_axis(axes, labels, pictures, prompts, (varied[0], varied[1]))[:MOST_SHEETS]


def _by_prompt(
    axes: Sequence[str], labels: Sequence[Labels], pictures: Pictures, prompts: Sequence[str], axis: int
) -> Sheet:
    """A row for the base and for each value of the axis, a column for each prompt."""
    count = len(prompts)
    first = next(iter(pictures.values()))
    table: list[list[Image.Image | None]] = [[*first[count:]]]
    for label in labels:
        table.append([*pictures[label][:count]] if label in pictures else [None] * count)
    names = [BASE, *(f"{axes[axis]}\n{label[axis]}" for label in labels)]
    return Sheet(axes[axis], labelled_grid(table, names, prompts))


def _axis_by_axis(
    axes: Sequence[str],
    labels: Sequence[Labels],
    pictures: Pictures,
    prompts: Sequence[str],
    shown: tuple[int, int],
) -> list[Sheet]:
    """A table for each prompt and each combination of the other axes' values."""
    down, across = shown
    rows, columns = ([*dict.fromkeys(label[axis] for label in labels)] for axis in shown)
    fixed = [axis for axis in range(len(axes)) if axis not in shown]
    found = []
    for others in dict.fromkeys(tuple(label[axis] for axis in fixed) for label in labels):
        at = {
            (label[down], label[across]): pictures[label]
            for label in labels
            if label in pictures and tuple(label[axis] for axis in fixed) == others
        }
        for number, prompt in enumerate(prompts if at else ()):
            table = [[at[row, column][number] if (row, column) in at else None for column in columns] for row in rows]
            names = [f"{axes[down]}\n{row}" for row in rows]
            about = [f"{axes[axis]} {label}" for axis, label in zip(fixed, others, strict=True)]
            sheet = labelled_grid(table, names, [f"{axes[across]} {column}" for column in columns])
            found.append(Sheet(", ".join([*about, prompt]), sheet))
    return found


def _opened(paths: Sequence[Path]) -> list[Image.Image]:
    pictures = []
    for path in paths:
        with Image.open(path) as picture:
            pictures.append(picture.convert("RGB"))
    return pictures
