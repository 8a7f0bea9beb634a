"""Pictures of the DreamBooth runs below each other, for the page: every subject, and one subject at several steps."""

from __future__ import annotations

from pathlib import Path

import torch
from PIL import Image, ImageDraw

from .gallery import grid

Run = tuple[str, int, int]
"""Subject, class images, steps."""
MARGIN = 104
"""Pixels left of a strip for what it is."""


def strip(made: dict[str, torch.Tensor], of_a_scene: int) -> Image.Image:
    """Four photos, the class before, the subject on a plain prompt and once in each scene, the class after.

    Args:
        made: pictures of each part, float32 [n, 3, 64, 64] in 0..1.
        of_a_scene: how many pictures there are of each scene.
    """
    shown = [made["photos"][:4], made["before"][:4], made["like"][:4], made["scenes"][::of_a_scene], made["after"][:4]]
    pictures = torch.cat(shown)
    return grid(pictures, [""] * len(pictures), len(pictures))


def strip_name(run: Run) -> str:
    """The file of a run's strip."""
    name, images, steps = run
    return f"{name}-{images}-{steps:04d}.png"


def below_each_other(folder: Path, runs: list[Run]) -> Image.Image | None:
    """The strips of those runs that are there, at half their size, each with its run at its left; None if none is."""
    there = [run for run in runs if (folder / strip_name(run)).exists()]
    if not there:
        return None
    strips = [Image.open(folder / strip_name(run)).convert("RGB").reduce(2) for run in there]
    width, height = strips[0].size
    sheet = Image.new("RGB", (MARGIN + width, height * len(strips)), "white")
    pen = ImageDraw.Draw(sheet)
    for number, ((name, images, steps), one) in enumerate(zip(there, strips, strict=True)):
        said = f"{name.replace('_', ' ')}\n{steps} steps\n{images or 'no'} class images"
        pen.text((4, height * number + 12), said, fill="black")
        sheet.paste(one, (MARGIN, height * number))
    return sheet
