"""Sheets of the DreamBooth runs' images for the docs."""

from __future__ import annotations

from pathlib import Path

import torch
from PIL import Image, ImageDraw

from .gallery import grid

Run = tuple[str, str, int]
"""Subject, way to keep the class, steps."""
MARGIN = 104
"""Pixels for the label to the left of a strip."""


def strip(made: dict[str, torch.Tensor], of_a_scene: int) -> Image.Image:
    """A row: four photos, the class before, the subject with a plain prompt and in each scene, the class after.

    Args:
        made: images by part, float32 [n, 3, 64, 64] in 0..1.
        of_a_scene: number of images per scene.
    """
    shown = [made["photos"][:4], made["before"][:4], made["like"][:4], made["scenes"][::of_a_scene], made["after"][:4]]
    pictures = torch.cat(shown)
    return grid(pictures, [""] * len(pictures), len(pictures))


def strip_name(run: Run) -> str:
    """The file name of a run's strip."""
    name, way, steps = run
    return f"{name}-{way}-{steps:04d}.png"


def stack_strips(folder: Path, runs: list[Run]) -> Image.Image | None:
    """A sheet of the existing strips of these runs at half size, with labels; None if there are none."""
    existing = [run for run in runs if (folder / strip_name(run)).exists()]
    if not existing:
        return None
    strips = [Image.open(folder / strip_name(run)).convert("RGB").reduce(2) for run in existing]
    width, height = strips[0].size
    sheet = Image.new("RGB", (MARGIN + width, height * len(strips)), "white")
    pen = ImageDraw.Draw(sheet)
    for number, ((name, way, steps), image) in enumerate(zip(existing, strips, strict=True)):
        label = f"{name.replace('_', ' ')}\n{steps} steps\n{way.replace('_', ' ')}"
        pen.text((4, height * number + 12), label, fill="black")
        sheet.paste(image, (MARGIN, height * number))
    return sheet
