"""Draw the README's picture from what `make demo` has drawn: photos, then three scenes before and after training.

python scripts/make_strip.py [demo_output/grid.png]     writes docs/strip.jpg
"""

from __future__ import annotations

import sys
from pathlib import Path

from PIL import Image, ImageDraw

ROOT = Path(__file__).resolve().parent.parent
sys.path.append(str(ROOT / "tests"))  # demo_grid imports the tests' client of ComfyUI

from demo_grid import GAP, LABEL, SCENES, SIDE  # noqa: E402

BEFORE, AFTER = 1, 2
"""Rows of the grid."""
PHOTO, SHOWN, WIDTH = 146, 3, 800


def tile(grid: Image.Image, row: int, column: int) -> Image.Image:
    """One picture of the grid."""
    left, top = column * (SIDE + GAP), row * (LABEL + SIDE + GAP) + LABEL
    return grid.crop((left, top, left + SIDE, top + SIDE))


def strip(grid: Image.Image) -> Image.Image:
    """The photos on the left; on the right a column for each scene, before training above and after it below."""
    scenes = WIDTH - SHOWN * (SIDE + GAP)
    sheet = Image.new("RGB", (WIDTH, 2 * (LABEL + SIDE + GAP)), "white")
    pen = ImageDraw.Draw(sheet)
    pen.text((0, 3), "four photos of one toy dog", fill="black", font_size=13)
    for number in range(4):
        across, down = number % 2, number // 2
        small = tile(grid, 0, number).resize((PHOTO, PHOTO), Image.Resampling.LANCZOS)
        sheet.paste(small, (across * (PHOTO + GAP), LABEL + down * (PHOTO + GAP)))
    named = ", ".join(SCENES[:SHOWN])
    labels = f"before: “a photo of a dog {named}”", "after 290 steps: “a photo of ohwx dog ...”"
    for place, (row, label) in enumerate(zip((BEFORE, AFTER), labels, strict=True)):
        top = place * (LABEL + SIDE + GAP)
        pen.text((scenes, top + 3), label, fill="black", font_size=13)
        for column in range(SHOWN):
            sheet.paste(tile(grid, row, column), (scenes + column * (SIDE + GAP), top + LABEL))
    return sheet


if __name__ == "__main__":
    source = Path(sys.argv[1]) if len(sys.argv) > 1 else ROOT / "demo_output" / "grid.png"
    strip(Image.open(source).convert("RGB")).save(ROOT / "docs" / "strip.jpg", quality=88, optimize=True)
