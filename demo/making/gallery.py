"""Generate the gallery for the docs: `python -m demo.making.gallery`. One image per class, not cherry-picked."""

from __future__ import annotations

from pathlib import Path

import torch
from PIL import Image, ImageDraw

from .classes import BACKGROUNDS, CLASS_WORDS, caption
from .measure import draw
from .narrow import load_narrow

TARGET = Path(__file__).resolve().parents[2] / "docs" / "demo-base-gallery.png"
COLUMNS = 13
SCALE, LABEL = 2, 14


def grid(pictures: torch.Tensor, labels: list[str], columns: int = COLUMNS) -> Image.Image:
    """A grid of images, float32 [n, 3, 64, 64] in 0..1, enlarged twice, each with its label below."""
    side = 64 * SCALE
    rows = -(-len(pictures) // columns)
    sheet = Image.new("RGB", (columns * (side + 4), rows * (side + LABEL + 4)), "white")
    pen = ImageDraw.Draw(sheet)
    for i, (picture, label) in enumerate(zip(pictures, labels, strict=True)):
        x, y = i % columns * (side + 4), i // columns * (side + LABEL + 4)
        array = (picture * 255).round().byte().permute(1, 2, 0).numpy()
        sheet.paste(Image.fromarray(array).resize((side, side), Image.Resampling.BICUBIC), (x, y))
        pen.text((x + 2, y + side + 1), label, fill="black")
    return sheet


def main() -> None:
    """Draw and write the gallery."""
    nets = load_narrow()
    pairs = [(word, BACKGROUNDS[i * 7 % len(BACKGROUNDS)]) for i, word in enumerate(CLASS_WORDS)]
    pictures = draw(nets, [caption(*pair) for pair in pairs], list(range(len(pairs))))
    labels = [f"{word}, {background}" for word, background in pairs]
    # 256 colours take a quarter of the space, without a visible difference in images this small.
    grid(pictures, labels).quantize(256).save(TARGET, optimize=True)


if __name__ == "__main__":
    main()
