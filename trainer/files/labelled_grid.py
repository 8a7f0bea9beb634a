"""Draws pictures as one table with labelled rows and columns, such as steps by prompts."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import torch
from PIL import Image, ImageDraw, ImageFont

LONGEST = 4096
"""Pixels of the longer side: pictures are scaled down so that a table of many stays within it."""

SMALLEST, SMALLEST_SHOWN = 192, 64
"""Smallest width of a cell in pixels: to which small pictures are enlarged so that labels fit, and in a large table."""

LABEL_LINES = 3
"""Lines of a column's label; the rest of a long prompt is cut off."""

PAPER, INK, FAINT, MARK = "white", "#1a1a1a", "#eeeeee", "#d97706"

_FONTS = ("DejaVuSans.ttf", "arial.ttf", "Arial Unicode.ttf", "NotoSans-Regular.ttf", "LiberationSans-Regular.ttf")
_FONTS_EAST_ASIA = ("NotoSansCJK-Regular.ttc", "msyh.ttc", "PingFang.ttc", "Arial Unicode.ttf")
"""Files of usual systems: the font that comes with PIL has only Latin letters."""

Font = ImageFont.FreeTypeFont | ImageFont.ImageFont


def labelled_grid(
    pictures: Sequence[Sequence[Image.Image | None]],
    rows: Sequence[str],
    columns: Sequence[str],
    marks: Mapping[int, str] | None = None,
) -> Image.Image:
    """Draw a table of pictures: ``rows`` on the left, ``columns`` above.

    Args:
        pictures: one sequence per row, with one picture per column; None leaves the cell empty. All are drawn in the
            size of the first one.
        rows: label of each row; may have several lines.
        columns: label of each column, such as a prompt; it is wrapped, and shortened to :data:`LABEL_LINES` lines.
        marks: rows to highlight: a word for each ("best"), drawn below the row's label.

    Returns:
        RGB, at most :data:`LONGEST` pixels on its longer side unless the cells would become smaller than
        :data:`SMALLEST_SHOWN`.

    Raises:
        ValueError: there is no picture, or the number of labels differs from that of the rows or columns.
    """
    first = next((picture for row in pictures for picture in row if picture is not None), None)
    if first is None or len(rows) != len(pictures) or any(len(row) != len(columns) for row in pictures):
        raise ValueError("pictures, rows and columns do not match")
    marks = marks or {}
    width, height = _cell_size(first, len(rows), len(columns))
    text_size = max(12, min(26, width // 13))
    gap = max(3, width // 64)
    labels = [f"{label}\n{marks[number]}" if number in marks else label for number, label in enumerate(rows)]
    font = font_for(text_size, "".join([*labels, *columns]))
    line = int(text_size * 1.3)
    wrapped = [_wrap(label, font, width - gap) for label in columns]
    left = int(max(font.getlength(part) for label in labels for part in label.split("\n"))) + 4 * gap
    top = max(len(lines) for lines in wrapped) * line + 3 * gap
    sheet = Image.new("RGB", (left + len(columns) * (width + gap), top + len(rows) * (height + gap)), PAPER)
    pen = ImageDraw.Draw(sheet)
    for column, lines in enumerate(wrapped):
        pen.multiline_text((left + column * (width + gap), gap), "\n".join(lines), INK, font, spacing=line - text_size)
    for row, label in enumerate(labels):
        y = top + row * (height + gap)
        colour = INK
        if row in marks:
            colour = MARK
            pen.rectangle((0, y - gap, sheet.width, y + height + gap - 1), fill=MARK)
            pen.rectangle((gap, y, left - gap - 1, y + height - 1), fill=PAPER)
        pen.multiline_text((2 * gap, y + height // 2), label, colour, font, anchor="lm", spacing=line - text_size)
        for column, picture in enumerate(pictures[row]):
            x = left + column * (width + gap)
            if picture is None:
                pen.rectangle((x, y, x + width - 1, y + height - 1), fill=FAINT)
            else:
                sheet.paste(picture.convert("RGB").resize((width, height), Image.Resampling.LANCZOS), (x, y))
    return sheet


def as_pictures(images: torch.Tensor) -> list[Image.Image]:
    """Images float32 [n, h, w, 3] in 0..1 as PIL's, rounded to 8 bits."""
    return [Image.fromarray(image) for image in (images.clamp(0, 1) * 255).round().to(torch.uint8).cpu().numpy()]


def _cell_size(picture: Image.Image, rows: int, columns: int) -> tuple[int, int]:
    """Size of a cell: that of the picture, unless it is too small for labels or too large for the sheet."""
    width, height = picture.size
    room = 0.94 * LONGEST  # the rest is for gaps
    fitting = min(room / ((columns + 0.5) * width), room / ((rows + 0.3) * height))
    scale = max(min(max(1.0, SMALLEST / width), fitting), SMALLEST_SHOWN / width)
    return max(1, round(width * scale)), max(1, round(height * scale))


def font_for(size: int, text: str) -> Font:
    """The font for a text: PIL's own font, or a font of the system for texts with other than Latin letters."""
    highest = max(map(ord, text), default=0)
    if highest > 0x24F:
        for name in _FONTS_EAST_ASIA if highest >= 0x2E80 else _FONTS:
            try:
                return ImageFont.truetype(name, size)
            except OSError:
                continue
    return ImageFont.load_default(size)


def _wrap(text: str, font: Font, width: int) -> list[str]:
    """The text in lines of at most ``width`` pixels; what does not fit ends with an ellipsis."""
    lines = [""]
    for word in text.split():
        longer = f"{lines[-1]} {word}".strip()
        if not lines[-1] or font.getlength(longer) <= width:
            lines[-1] = longer
        else:
            lines.append(word)
    shown = lines[:LABEL_LINES]
    if len(lines) > LABEL_LINES:
        shown[-1] += "…"
    return [_shorten(line, font, width) for line in shown]


def _shorten(line: str, font: Font, width: int) -> str:
    if font.getlength(line) <= width:
        return line
    line = line.rstrip("…")
    while line and font.getlength(line + "…") > width:
        line = line[:-1]
    return line + "…"
