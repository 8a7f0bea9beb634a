"""The table of pictures: each lies in its cell, labels can be read, and nothing grows without bound."""

from __future__ import annotations

import numpy as np
import pytest
from PIL import Image

from subjectbooth.trainer.files.labelled_grid import LONGEST, MARK, SMALLEST, labelled_grid

COLOURS = ("red", "lime", "blue", "cyan", "magenta", "yellow")
LONG = "a photo of ohwx dog in a bucket on the beach at sunset, very detailed, with many more words than there is room"


def _plain(colour: str, size: int = 256) -> Image.Image:
    return Image.new("RGB", (size, size), colour)


def _where(sheet: Image.Image, colour: str) -> tuple[int, int, int, int]:
    """Left, top, right and bottom of all pixels of one colour."""
    found = np.argwhere((np.asarray(sheet) == Image.new("RGB", (1, 1), colour).getpixel((0, 0))).all(-1))
    (top, left), (bottom, right) = found.min(0), found.max(0)
    return int(left), int(top), int(right), int(bottom)


def test_pictures_lie_in_rows_and_columns_and_labels_beside_them() -> None:
    pictures = [[_plain(colour) for colour in COLOURS[row * 2 : row * 2 + 2]] for row in range(3)]
    sheet = labelled_grid(pictures, ["step 10", "step 20", "step 1300"], ["ohwx dog", LONG])
    places = [_where(sheet, colour) for colour in COLOURS]
    assert all((right - left, bottom - top) == (255, 255) for left, top, right, bottom in places)
    lefts, tops = [place[0] for place in places], [place[1] for place in places]
    assert len(set(lefts[::2])) == len(set(lefts[1::2])) == 1 and lefts[0] + 256 < lefts[1]
    assert tops[::2] == tops[1::2] and tops[0] + 256 < tops[2] < tops[4]
    ink = np.asarray(sheet.convert("L")) < 100
    for top in tops[::2]:
        label = ink[top : top + 256, : lefts[0]]
        assert label.any() and not label[:, :2].any() and not label[:, -2:].any(), "no label is cut off"
    heads = ink[: tops[0]]
    assert heads[:, lefts[1] :].sum() > 3 * heads[:, lefts[0] : lefts[0] + 256].sum() > 0
    assert not heads[-2:].any() and not heads[:, : lefts[0]].any(), "a long prompt is wrapped and ends above its column"


def test_a_marked_row_is_framed_and_an_empty_cell_is_left() -> None:
    pictures = [[_plain("red"), _plain("lime")], [_plain("blue"), None]]
    plain = labelled_grid(pictures, ["step 1", "step 2"], ["a", "b"])
    marked = labelled_grid(pictures, ["step 1", "step 2"], ["a", "b"], {1: "chosen"})
    with pytest.raises(ValueError):
        _where(plain, MARK)
    left, top, right, bottom = _where(marked, MARK)
    assert (left, right, bottom) == (0, marked.width - 1, marked.height - 1)
    assert _where(marked, "red")[3] < top < _where(marked, "blue")[1]


def test_a_small_picture_is_enlarged_and_a_table_of_many_is_bounded() -> None:
    small = labelled_grid([[_plain("red", 64)]], ["step 1"], ["a photo of ohwx dog"])
    left, _, right, _ = _where(small, "red")
    assert right - left + 1 == SMALLEST
    many = labelled_grid([[_plain("red", 512)] * 3] * 30, [f"step {row}00" for row in range(30)], [LONG] * 3)
    assert max(many.size) <= LONGEST


def test_other_letters_than_latin_ones_are_drawn() -> None:
    """Not as the same empty box for each, where the system has any font for them."""
    sheets = [labelled_grid([[_plain("red")]], ["1"], [text]) for text in ("щщщ", "ддд")]
    if sheets[0].tobytes() == sheets[1].tobytes():
        pytest.skip("no font with Cyrillic letters on this machine")
    assert sheets[0].size == sheets[1].size


@pytest.mark.parametrize("pictures", [[], [[]], [[None]], [[_plain("red")] * 2]])
def test_what_makes_no_table_is_an_error(pictures: list[list[Image.Image | None]]) -> None:
    with pytest.raises(ValueError, match="do not match"):
        labelled_grid(pictures, ["step 1"], ["a"])
