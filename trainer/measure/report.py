"""An evaluation as a table (Markdown, CSV, JSON) and as a grid of pictures."""

from __future__ import annotations

import csv
import io
import json
from typing import Any

import torch
from PIL import Image, ImageDraw

from ..files.labelled_grid import font_for
from .evaluation import Evaluation

MARGIN, GAP, SEED_GAP = 8, 2, 10
"""Pixels around the sheet, between the two pictures of a seed, and between seeds."""
TEXT, LINE = 14, 22
"""Pixels: size of the letters, and height of a line."""
INK, PALE = "black", "#666666"


def markdown(evaluation: Evaluation) -> str:
    """The figures as a Markdown table, with notes."""
    lines = ["| figure | value | ± | meaning |", "|---|---|---|---|"]
    for name, figure in evaluation.figures.items():
        lines.append(f"| {name} | {figure.value:.3f} | {figure.error:.3f} | {figure.meaning} |")
    count = len(evaluation.seeds)
    about = f"Embedding: {evaluation.embedder}. Mean and standard error over {count} seeds."
    return "\n".join([*lines, "", about, *evaluation.notes]) + "\n"


def as_csv(evaluation: Evaluation) -> str:
    """One line per figure: name, value, standard error, and the value of each seed."""
    text = io.StringIO()
    writer = csv.writer(text, lineterminator="\n")
    writer.writerow(["figure", "value", "error", *(f"seed {seed}" for seed in evaluation.seeds)])
    for name, figure in evaluation.figures.items():
        writer.writerow([name, figure.value, figure.error, *figure.per_seed])
    return text.getvalue()


def as_json(evaluation: Evaluation) -> str:
    """The figures and what they were measured with, as JSON."""
    prompts: dict[str, list[str]] = {}
    for row in evaluation.rows:
        prompts.setdefault(row.group, []).append(row.prompt)
    content: dict[str, Any] = {
        "embedder": evaluation.embedder,
        "seeds": list(evaluation.seeds),
        "prompts": prompts,
        "figures": {
            name: {"value": figure.value, "error": figure.error, "per_seed": list(figure.per_seed)}
            for name, figure in evaluation.figures.items()
        },
        "notes": list(evaluation.notes),
    }
    return json.dumps(content, indent=1, ensure_ascii=False, allow_nan=False) + "\n"


def grid(evaluation: Evaluation, side: int = 128) -> Image.Image:
    """All pictures: a row per prompt, and for each seed the picture without and with the LoRA.

    Args:
        side: width of a picture in pixels.
    """
    font = font_for(TEXT, "".join(row.prompt for row in evaluation.rows))
    count = len(evaluation.seeds)
    pair = 2 * side + GAP
    width = 2 * MARGIN + count * pair + (count - 1) * SEED_GAP
    # Pictures of one row have one size, but rows may differ from each other.
    heights = [round(side * row.before.shape[2] / row.before.shape[3]) for row in evaluation.rows]
    sheet = Image.new("RGB", (width, 2 * MARGIN + LINE + sum(height + LINE + GAP for height in heights)), "white")
    pen = ImageDraw.Draw(sheet)
    lefts = [MARGIN + number * (pair + SEED_GAP) for number in range(count)]
    for left, seed in zip(lefts, evaluation.seeds, strict=True):
        pen.text((left, MARGIN), f"seed {seed}: before", INK, font)
        pen.text((left + side + GAP, MARGIN), "with the LoRA", INK, font)
    top = MARGIN + LINE
    for row, height in zip(evaluation.rows, heights, strict=True):
        pen.text((MARGIN, top + LINE - TEXT - 4), f"{row.group}: ", PALE, font)
        pen.text((MARGIN + pen.textlength(f"{row.group}: ", font=font), top + LINE - TEXT - 4), row.prompt, INK, font)
        top += LINE
        for number, left in enumerate(lefts):
            for offset, pictures in enumerate((row.before, row.after)):
                sheet.paste(_image(pictures[number], (side, height)), (left + offset * (side + GAP), top))
        top += height + GAP
    return sheet


def _image(pixels: torch.Tensor, size: tuple[int, int]) -> Image.Image:
    return Image.fromarray(pixels.permute(1, 2, 0).numpy()).resize(size, Image.Resampling.BICUBIC)
