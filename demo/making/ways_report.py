"""The table and the picture of ``docs/preservation.md``, from the runs of :mod:`demo.making.ways`.

``python -m demo.making.ways_report`` prints the table and writes ``docs/preservation.svg``. Each figure is the mean
over subjects and seeds; behind it stand the standard deviation over subjects of their means and, in brackets, that over
the seeds of one subject.
"""

from __future__ import annotations

import json
from collections import defaultdict
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from statistics import mean, pstdev, variance
from typing import Any

import torch

from .classes import caption, place
from .gain import CFG, SAMPLE_STEPS
from .measure import draw
from .narrow import load_narrow
from .subjects import SUBJECTS
from .ways import FOLDER, train, ways

TARGET = Path(__file__).resolve().parents[2] / "docs" / "preservation.svg"
COLUMNS = {
    "gain": "gain",
    "gain_in_new_scenes": "in new scenes",
    "class_prompt_is_the_subject": "class is the subject",
    "drift_class": "drift of the class",
    "drift_others": "of other things",
}
WIDTH, HEIGHT, MARGIN = 640, 380, 52
LOWEST_GAIN, HIGHEST_GAIN = 0.75, 1.0
LONGEST_DRIFT = 1.4
NOT_SHOWN = ("curvature, with class images",)
"""Lies on another point. Ways that learn too little to compare, and trials on three subjects, are left out as well."""
LABELS = {"curvature, weight 128": "curvature, prior_loss_weight 0.5"}

Row = Mapping[str, Any]


def rows_by_way(folder: Path = FOLDER) -> dict[str, list[Row]]:
    """All finished runs, by way."""
    found: dict[str, list[Row]] = defaultdict(list)
    for path in sorted(folder.glob("*.json")):
        row = json.loads(path.read_text(encoding="utf-8"))
        found[row["way"]].append(row)
    return dict(found)


def figure(rows: Iterable[Row], name: str) -> tuple[float, float, float | None]:
    """The mean over all runs, the spread over subjects, and that over the seeds of one subject if there are several."""
    by_subject: dict[str, list[float]] = defaultdict(list)
    for row in rows:
        by_subject[row["subject"]].append(row[name])
    means = [mean(values) for values in by_subject.values()]
    within = [variance(values) for values in by_subject.values() if len(values) > 1]
    return mean(means), pstdev(means), mean(within) ** 0.5 if within else None


def cell(rows: Iterable[Row], name: str) -> str:
    """A figure in the table."""
    middle, over_subjects, over_seeds = figure(rows, name)
    return f"{middle:.2f} ± {over_subjects:.2f}" + ("" if over_seeds is None else f" ({over_seeds:.2f})")


def counted(rows: Sequence[Row]) -> str:
    """How many subjects and seeds were run."""
    runs = sorted(sum(row["subject"] == name for row in rows) for name in {row["subject"] for row in rows})
    return f"{len(runs)} x {runs[0]}" + (f" to {runs[-1]}" if runs[-1] > runs[0] else "")


def seconds(rows: Iterable[Row]) -> tuple[float, float]:
    """Processor time of the steps, and of everything: class images, study and steps."""
    steps = [row["steps_seconds"] for row in rows]
    total = [row["drawing_seconds"] + row["before_seconds"] + row["steps_seconds"] for row in rows]
    return mean(steps), mean(total)


def table(found: Mapping[str, Sequence[Row]]) -> str:
    """Markdown, with the time relative to that of ``none``."""
    plain_steps, plain_total = seconds(found["none"])
    head = ["way", "subjects x seeds", *COLUMNS.values(), "time of a step", "of the run"]
    lines = [f"| {' | '.join(head)} |", f"|{'---|' * len(head)}"]
    for way, rows in found.items():
        steps, total = seconds(rows)
        cells = [counted(rows), *(cell(rows, name) for name in COLUMNS)]
        cells += [f"{steps / plain_steps:.2f}", f"{total / plain_total:.2f}"]
        lines.append(f"| {way} | {' | '.join(cells)} |")
    return "\n".join(lines)


def drift_of(rows: Sequence[Row]) -> float:
    """The mean of both drifts."""
    return (figure(rows, "drift_class")[0] + figure(rows, "drift_others")[0]) / 2


def plot(found: Mapping[str, Sequence[Row]]) -> str:
    """An SVG: what is learned over what is lost. The upper left is best."""

    def place(rows: Sequence[Row]) -> tuple[float, float]:
        gain = figure(rows, "gain_in_new_scenes")[0]
        share = (max(gain, LOWEST_GAIN) - LOWEST_GAIN) / (HIGHEST_GAIN - LOWEST_GAIN)
        along = min(drift_of(rows), LONGEST_DRIFT) / LONGEST_DRIFT
        return MARGIN + along * (WIDTH - 2 * MARGIN), HEIGHT - MARGIN - share * (HEIGHT - 2 * MARGIN)

    parts = [
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {WIDTH} {HEIGHT}" font-family="sans-serif" '
        f'font-size="12"><rect width="{WIDTH}" height="{HEIGHT}" fill="white"/>',
        f'<path d="M{MARGIN} {MARGIN}V{HEIGHT - MARGIN}H{WIDTH - MARGIN}" fill="none" stroke="#888"/>',
        f'<text x="{WIDTH / 2}" y="{HEIGHT - 12}" text-anchor="middle">what else has changed: drift '
        "(0 unchanged, 1 another random picture)</text>",
        f'<text transform="translate(16 {HEIGHT / 2}) rotate(-90)" text-anchor="middle">the subject in new scenes: '
        "gain</text>",
    ]
    for number in range(6):
        value = LOWEST_GAIN + number * (HIGHEST_GAIN - LOWEST_GAIN) / 5
        y = HEIGHT - MARGIN - number * (HEIGHT - 2 * MARGIN) / 5
        parts.append(f'<text x="{MARGIN - 6}" y="{y + 4:.0f}" text-anchor="end" fill="#555">{value:.2f}</text>')
    for number in range(8):
        x = MARGIN + number * (WIDTH - 2 * MARGIN) / 7
        text = f"{number * LONGEST_DRIFT / 7:.1f}"
        parts.append(f'<text x="{x:.0f}" y="{HEIGHT - MARGIN + 16}" text-anchor="middle" fill="#555">{text}</text>')
    for way, rows in found.items():
        x, y = place(rows)
        if figure(rows, "gain_in_new_scenes")[0] < LOWEST_GAIN or way in NOT_SHOWN or "T-LoRA" in way:
            continue
        colour = "#d97706" if way == "curvature" else "#2563eb"
        parts.append(f'<circle cx="{x:.1f}" cy="{y:.1f}" r="5" fill="{colour}"/>')
        side, move = ("end", -9) if x > WIDTH * 0.7 else ("start", 9)
        parts.append(f'<text x="{x + move:.1f}" y="{y + 4:.1f}" text-anchor="{side}">{LABELS.get(way, way)}</text>')
    return "\n".join([*parts, "</svg>"]) + "\n"


SHOWN = ("none", "class_images", "curvature")
SHOWN_OTHERS = ("clock", "rocket", "cat")
PICTURES = Path(__file__).resolve().parents[2] / "docs" / "preservation.png"


@torch.no_grad()
def write_pictures(name: str = "dog", seed: int = 0) -> None:
    """The subject, its class and other things, by the base and after training with each of SHOWN; the same seeds."""
    from trainer.files.labelled_grid import as_pictures, labelled_grid

    word = SUBJECTS[name].class_word
    nets, known = load_narrow(), ways()
    columns = [f"ohwx {word}", word, word, *SHOWN_OTHERS]
    captions = [f"a photo of ohwx {word} {place('beach')}", *(caption(thing, None) for thing in columns[1:])]
    seeds = [300, 100, 103, *range(5001, 5001 + len(SHOWN_OTHERS))]
    drawn = {"before": nets} | {way: train(nets, name, seed, *known[way])[0] for way in SHOWN}
    rows = [as_pictures(draw(by, captions, seeds, SAMPLE_STEPS, CFG).movedim(1, -1)) for by in drawn.values()]
    sheet = labelled_grid(rows, [label.replace("_", "\n") for label in drawn], columns)
    sheet.resize((sheet.width // 2, sheet.height // 2)).quantize(96).save(PICTURES, optimize=True)


def main() -> None:
    """Print the table, write the picture."""
    found = rows_by_way()
    shown = {way: found[way] for way in sorted(found, key=lambda way: drift_of(found[way]))}
    print(table(shown))
    TARGET.write_text(plot(shown), encoding="utf-8")
    write_pictures()


if __name__ == "__main__":
    main()
