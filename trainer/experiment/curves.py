"""The figures of a grid as one SVG of small charts: curves with their spread over seeds, or dots with whiskers."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from html import escape

from .table import Cell

WIDTH, HEIGHT = 300, 210
"""Pixels of a chart."""
LEFT, RIGHT, TOP, BOTTOM = 44, 12, 30, 34
"""Margins of a chart of curves."""
COLUMNS = 3
ROW = 20
"""Pixels of a line of dots or of the legend."""
LETTER = 6.2
"""Rough width of a letter in pixels, because no font is measured here."""
LONGEST = 42
COLOURS = ("#2563eb", "#d97706", "#059669", "#dc2626", "#7c3aed", "#0891b2", "#be185d", "#4d7c0f")


@dataclass(frozen=True)
class Curve:
    """A labelled curve: ``points`` of x and the figure there."""

    label: str
    points: Sequence[tuple[float, Cell]]


def curves(charts: Sequence[tuple[str, Sequence[Curve]]], x_label: str) -> str:
    """Charts of curves; a band shows one standard deviation to both sides.

    Args:
        charts: the title and the curves of each; all have the same labels.
        x_label: below each chart.
    """
    labels = [curve.label for curve in charts[0][1]]
    legend_height = ROW * (len(labels) + 1) if len(labels) > 1 else 8
    rows = math.ceil(len(charts) / COLUMNS)
    parts = []
    for number, (title, shown) in enumerate(charts):
        x, y = WIDTH * (number % COLUMNS), HEIGHT * (number // COLUMNS)
        parts.append(f'<g transform="translate({x} {y})">{_chart(title, shown, x_label)}</g>')
    if len(labels) > 1:
        for number, label in enumerate(labels):
            y = rows * HEIGHT + ROW * (number + 1)
            parts.append(f'<rect x="{LEFT}" y="{y - 10}" width="14" height="10" fill="{_colour(number)}"/>')
            parts.append(_text(LEFT + 20, y, label))
    width = WIDTH * min(COLUMNS, len(charts))
    return _svg(parts, width, rows * HEIGHT + legend_height)


def _chart(title: str, shown: Sequence[Curve], x_label: str) -> str:
    points = [point for curve in shown for point in curve.points]
    xs = [x for x, _ in points]
    low, high = _range([cell.mean + sign * cell.spread for _, cell in points for sign in (-1, 1)])
    first, last = min(xs), max(xs)

    def at(x: float, value: float) -> tuple[float, float]:
        along = (x - first) / (last - first) if last > first else 0.5
        return (
            LEFT + along * (WIDTH - LEFT - RIGHT),
            HEIGHT - BOTTOM - (value - low) / (high - low) * (HEIGHT - TOP - BOTTOM),
        )

    parts = [_text(LEFT, TOP - 12, title, weight="bold")]
    for value in (low, (low + high) / 2, high):
        y = at(first, value)[1]
        parts.append(f'<path d="M{LEFT} {y:.1f}H{WIDTH - RIGHT}" stroke="#ddd"/>')
        parts.append(_text(LEFT - 5, y + 4, f"{value:.3g}", "end", "#555"))
    for x in sorted({first, last}):
        parts.append(_text(at(x, low)[0], HEIGHT - BOTTOM + 14, f"{x:g}", "middle", "#555"))
    parts.append(_text((LEFT + WIDTH - RIGHT) / 2, HEIGHT - BOTTOM + 28, x_label, "middle", "#555"))
    for number, curve in enumerate(shown):
        colour = _colour(number)
        upper = [at(x, cell.mean + cell.spread) for x, cell in curve.points]
        lower = [at(x, cell.mean - cell.spread) for x, cell in curve.points]
        middle = [at(x, cell.mean) for x, cell in curve.points]
        if any(cell.spread for _, cell in curve.points):
            parts.append(f'<polygon points="{_points([*upper, *lower[::-1]])}" fill="{colour}" opacity="0.15"/>')
        parts.append(f'<polyline points="{_points(middle)}" fill="none" stroke="{colour}" stroke-width="1.8"/>')
        parts += [f'<circle cx="{x:.1f}" cy="{y:.1f}" r="2.6" fill="{colour}"/>' for x, y in middle]
    return "".join(parts)


def dots(charts: Sequence[tuple[str, Sequence[Cell | None]]], labels: Sequence[str]) -> str:
    """Charts of dots: a line for each label with the mean, a whisker of one standard deviation, and the single runs.

    Args:
        charts: the title, and the figure for each label, of each; None: no run has it.
        labels: of the lines.
    """
    label_width = 16 + LETTER * max(min(len(label), LONGEST) for label in labels)
    plot = WIDTH - 60
    height = TOP + ROW * len(labels) + BOTTOM
    columns = max(1, min(COLUMNS, len(charts)))
    parts = []
    for number, (title, cells) in enumerate(charts):
        x0 = label_width + (number % columns) * (plot + 40)
        y0 = (number // columns) * height
        values = [
            value
            for cell in cells
            if cell
            for value in (*cell.values, cell.mean - cell.spread, cell.mean + cell.spread)
        ]
        low, high = _range(values)

        def at(value: float, x0: float = x0, low: float = low, high: float = high) -> float:
            return x0 + (value - low) / (high - low) * plot

        parts.append(_text(x0, y0 + TOP - 12, title, weight="bold"))
        for value in (low, high):
            parts.append(_text(at(value), y0 + height - BOTTOM + 14, f"{value:.3g}", "middle", "#555"))
        for line, cell in enumerate(cells):
            y = y0 + TOP + ROW * (line + 0.5)
            parts.append(f'<path d="M{x0:.1f} {y:.1f}h{plot}" stroke="#eee"/>')
            if number % columns == 0:
                parts.append(_text(label_width - 8, y + 4, labels[line], "end"))
            if cell is None:
                parts.append(_text(x0 + 4, y + 4, "failed", colour="#dc2626"))
                continue
            left, right = at(cell.mean - cell.spread), at(cell.mean + cell.spread)
            parts.append(f'<path d="M{left:.1f} {y:.1f}H{right:.1f}" stroke="{COLOURS[0]}" stroke-width="2"/>')
            single = cell.values if len(cell.values) > 1 else ()
            parts += [f'<circle cx="{at(v):.1f}" cy="{y:.1f}" r="2" fill="#999"/>' for v in single]
            parts.append(f'<circle cx="{at(cell.mean):.1f}" cy="{y:.1f}" r="4" fill="{COLOURS[0]}"/>')
    return _svg(parts, label_width + columns * (plot + 40), height * math.ceil(len(charts) / columns))


def _range(values: Sequence[float]) -> tuple[float, float]:
    """From 0 where that is near, otherwise around the values."""
    low, high = min(values, default=0.0), max(values, default=1.0)
    if 0 <= low <= 0.6 * high:
        low = 0.0
    room = 0.04 * (high - low) or max(abs(high), 1.0) * 0.05
    return (low - (room if low else 0.0)), high + room


def _colour(number: int) -> str:
    return COLOURS[number % len(COLOURS)]


def _points(points: Sequence[tuple[float, float]]) -> str:
    return " ".join(f"{x:.1f},{y:.1f}" for x, y in points)


def _text(x: float, y: float, text: str, anchor: str = "start", colour: str = "#1a1a1a", weight: str = "normal") -> str:
    shown = text if len(text) <= LONGEST else text[: LONGEST - 1] + "…"
    style = f'text-anchor="{anchor}" fill="{colour}" font-weight="{weight}"'
    return f'<text x="{x:.1f}" y="{y:.1f}" {style}>{escape(shown)}</text>'


def _svg(parts: Sequence[str], width: float, height: float) -> str:
    head = (
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {width:.0f} {height:.0f}" width="{width:.0f}" '
        f'height="{height:.0f}" font-family="sans-serif" font-size="11">'
        f'<rect width="{width:.0f}" height="{height:.0f}" fill="white"/>'
    )
    return "\n".join([head, *parts, "</svg>"]) + "\n"
