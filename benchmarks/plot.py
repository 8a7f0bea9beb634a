"""Line plots as one small SVG, without a plotting package."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from html import escape

WIDTH, HEIGHT, LEFT, BOTTOM, TOP, RIGHT = 300, 210, 46, 40, 34, 46
TIME, MEMORY = "#2563eb", "#d97706"


@dataclass(frozen=True)
class Panel:
    """Time and memory against one setting.

    Attributes:
        title, across: the panel's and the axis's name.
        at: the values of the setting, rising.
        time: seconds, one for each.
        memory: GB, one for each.
        time_name: what the seconds are of.
    """

    title: str
    across: str
    at: Sequence[float]
    time: Sequence[float]
    memory: Sequence[float]
    time_name: str


def svg(panels: Sequence[Panel], columns: int = 2) -> str:
    """All panels in a grid: time in blue on the left axis, memory in orange on the right one, both from zero."""
    rows = math.ceil(len(panels) / columns)
    width, height = columns * WIDTH, rows * HEIGHT
    parts = [
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {width} {height}" font-family="sans-serif" '
        f'font-size="11"><rect width="{width}" height="{height}" fill="white"/>'
    ]
    for number, panel in enumerate(panels):
        across, down = number % columns * WIDTH, number // columns * HEIGHT
        parts += [f'<g transform="translate({across} {down})">', *_panel(panel), "</g>"]
    return "\n".join([*parts, "</svg>"]) + "\n"


def _panel(panel: Panel) -> list[str]:
    inner_width, inner_height = WIDTH - LEFT - RIGHT, HEIGHT - TOP - BOTTOM
    most_time, most_memory, last = _round_up(max(panel.time)), _round_up(max(panel.memory)), max(panel.at)

    def x(value: float) -> float:
        return LEFT + inner_width * value / last

    def y(value: float, most: float) -> float:
        return HEIGHT - BOTTOM - inner_height * value / most

    lines = [
        f'<text x="{WIDTH / 2:g}" y="14" text-anchor="middle" font-weight="bold">{escape(panel.title)}</text>',
        f'<path d="M{LEFT} {TOP}V{HEIGHT - BOTTOM}H{WIDTH - RIGHT}V{TOP}" fill="none" stroke="#888"/>',
        f'<text x="{WIDTH / 2:g}" y="{HEIGHT - 8}" text-anchor="middle">{escape(panel.across)}</text>',
        f'<text x="4" y="{TOP - 8}" fill="{TIME}">{escape(panel.time_name)}</text>',
        f'<text x="{WIDTH - 4}" y="{TOP - 8}" text-anchor="end" fill="{MEMORY}">peak GB</text>',
    ]
    for share in (0, 0.5, 1):
        height = y(share, 1) + 4
        lines.append(
            f'<text x="{LEFT - 4}" y="{height:g}" text-anchor="end" fill="{TIME}">{share * most_time:g}</text>'
        )
        lines.append(f'<text x="{WIDTH - RIGHT + 4}" y="{height:g}" fill="{MEMORY}">{share * most_memory:g}</text>')
    shown = [value for value in panel.at if value == last or x(value) < x(last) - 30]
    for number, value in enumerate(shown):
        if number and x(value) - x(shown[number - 1]) < 22:
            continue
        lines.append(f'<text x="{x(value):.0f}" y="{HEIGHT - BOTTOM + 14}" text-anchor="middle">{value:g}</text>')
    for values, most, colour in ((panel.time, most_time, TIME), (panel.memory, most_memory, MEMORY)):
        points = [(x(at), y(value, most)) for at, value in zip(panel.at, values, strict=True)]
        path = " ".join(f"{across:.1f},{down:.1f}" for across, down in points)
        lines.append(f'<polyline points="{path}" fill="none" stroke="{colour}" stroke-width="1.5"/>')
        lines += [f'<circle cx="{across:.1f}" cy="{down:.1f}" r="2.5" fill="{colour}"/>' for across, down in points]
    return lines


def _round_up(value: float) -> float:
    """The next of 1, 2, 4, 5, 8 or 10 times a power of ten."""
    power = 10.0 ** math.floor(math.log10(value))
    return next(step * power for step in (1, 2, 4, 5, 8, 10) if step * power >= value)
