"""Crop and caption of single photos: what is trained is the square that was chosen, and bad numbers are told."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image
from skimage import data

from subjectbooth.tests.fuzzing import is_clean
from subjectbooth.trainer.errors import SubjectBoothError
from subjectbooth.trainer.subject.photo import Photo
from subjectbooth.trainer.subject.photo_edits import PhotoEdit, edited, parse_edits, square_in, unused_note
from subjectbooth.trainer.subject.photo_files import read_photos
from subjectbooth.trainer.subject.subject import Subject, make_subject

CAT = np.ascontiguousarray(data.chelsea()[:, :, :3])  # 300 x 451


def _subject(*photos: Photo, crop: str = "center") -> Subject:
    return make_subject(photos, class_word="cat", resolution=64, crop=crop)


def _photo(**more: Any) -> Photo:
    return Photo(CAT, None, "", "cat.png", **more)


@pytest.mark.parametrize(
    ("crop", "expected"),
    [
        ((0.5, 0.5, 1.0), (76, 0, 300)),  # the largest square in the middle; round(225.5 - 150) is 76
        ((0.0, 0.0, 0.5), (0, 0, 150)),
        ((1.0, 1.0, 0.5), (301, 150, 150)),  # moved inside
        ((0.5, 0.5, 0.05), (218, 142, 15)),
    ],
)
def test_a_square_lies_inside_the_photo(crop: tuple[float, float, float], expected: tuple[int, int, int]) -> None:
    assert square_in(451, 300, crop) == expected
    left, top, side = square_in(300, 451, crop)
    assert 0 <= left <= 300 - side and 0 <= top <= 451 - side


@pytest.mark.parametrize("crop", ["center", "pad", "subject"])
def test_what_is_trained_is_the_square(crop: str) -> None:
    left, top, side = square_in(451, 300, (0.3, 0.6, 0.5))
    wanted = np.asarray(
        Image.fromarray(CAT).crop((left, top, left + side, top + side)).resize((64, 64), Image.Resampling.LANCZOS)
    )
    mask = np.zeros(CAT.shape[:2], np.float32)
    mask[top + 5 : top + 20, left + 5 : left + 20] = 1  # which crop "subject" alone would be drawn to
    photo = edited(replace(_photo(), mask=mask), PhotoEdit((0.3, 0.6, 0.5)))
    prepared = _subject(photo, crop=crop).prepare()
    got = np.rint(prepared.images[0].permute(1, 2, 0).numpy() * 255)
    assert np.array_equal(got, wanted)
    (bucket,) = _subject(photo, crop=crop).prepare_buckets()
    assert bucket.images.shape[2:] == (64, 64), "a square that was chosen stays one"
    assert prepared.masks is not None and prepared.masks.sum() > 0


def test_only_what_changes_the_pixels_or_the_caption_changes_the_key() -> None:
    plain = _subject(_photo()).prepare().digest
    assert plain == _subject(edited(_photo(), PhotoEdit())).prepare().digest
    moved = _subject(edited(_photo(), PhotoEdit((0.4, 0.5, 1.0)))).prepare().digest
    said = _subject(edited(_photo(), PhotoEdit(caption="ohwx {class} asleep"))).prepare()
    assert len({plain, moved, said.digest}) == 3
    assert said.captions == ("ohwx cat asleep",)


def test_the_checks_see_the_square() -> None:
    warnings = _subject(edited(_photo(), PhotoEdit((0.5, 0.5, 0.1)))).warnings
    assert any("cat.png is 30x30, smaller than the training size 64" in text for text in warnings)


def test_a_caption_of_its_own_comes_before_its_file(tmp_path: Path) -> None:
    paths = [tmp_path / "a.png", tmp_path / "b.png"]
    for path in paths:
        Image.fromarray(CAT).save(path)
    (tmp_path / "b.txt").write_text("from the file")
    edits = [PhotoEdit(caption="its own"), PhotoEdit()]
    photos, _ = read_photos(paths, "files", edits=edits)  # a.txt is missing, and not needed
    assert [photo.caption for photo in photos] == ["its own", "from the file"]
    photos, _ = read_photos(paths, "template", edits=edits)
    assert [photo.caption for photo in photos] == ["its own", ""]


def test_the_text_of_a_workflow() -> None:
    assert parse_edits("") == parse_edits(" \n") == parse_edits("{}") == {}
    text = '{"a.jpg": {"crop": [0, 1, 0.05]}, "b.jpg": {"caption": " two\\n lines "}, "c.jpg": {}}'
    assert parse_edits(text) == {
        "a.jpg": PhotoEdit((0.0, 1.0, 0.05)),
        "b.jpg": PhotoEdit(caption="two lines"),
        "c.jpg": PhotoEdit(),
    }
    edits = parse_edits(text)
    assert unused_note(edits, ["a.jpg", "b.jpg", "c.jpg"]) == []
    assert unused_note(edits, ["a.jpg", "c.jpg"]) == [
        "b.jpg is not among the photos, so its entry in photo_edits is not used."
    ]


def _painted(path: Path, size: tuple[int, int], box: tuple[int, int, int, int]) -> Path:
    """As ComfyUI's mask editor saves it: the painted part is transparent."""
    picture = Image.fromarray(CAT).resize(size).convert("RGBA")
    picture.paste((0, 0, 0, 0), box)
    picture.save(path)
    return path


def test_what_is_painted_is_the_subject(tmp_path: Path) -> None:
    mask = _painted(tmp_path / "mask.png", (451, 300), (100, 50, 200, 150))
    photo = edited(_photo(), PhotoEdit(mask="mask.png"), mask)
    assert photo.mask is not None and photo.mask.shape == (300, 451)
    assert photo.mask[50:150, 100:200].min() == 1 and photo.mask.sum() == 100 * 100
    assert np.array_equal(photo.pixels, CAT), "nothing becomes white"
    # The crop "subject" goes around it, and a crop by hand takes its part of it.
    around = _subject(photo, crop="subject").prepare()
    assert around.masks is not None and around.masks.mean() > 0.6
    part = edited(_photo(), PhotoEdit((150 / 451, 100 / 300, 100 / 300)), mask)
    assert part.pixels.shape == (100, 100, 3) and part.mask is not None and part.mask.mean() == 1
    half = edited(_photo(), PhotoEdit(), _painted(tmp_path / "half.png", (226, 150), (50, 25, 100, 75)))
    assert half.mask is not None and half.mask.shape == (300, 451) and abs(half.mask.mean() - photo.mask.mean()) < 0.01
    assert edited(_photo(), PhotoEdit(), _painted(tmp_path / "none.png", (451, 300), (0, 0, 0, 0))).mask is None


@pytest.mark.parametrize("orientation", range(1, 9))
def test_a_mask_is_turned_like_the_photo_that_it_was_painted_on(tmp_path: Path, orientation: int) -> None:
    """ComfyUI's mask editor shows a photo as it is stored, whatever its EXIF data say."""
    exif = Image.Exif()
    exif[0x0112] = orientation
    where = (100, 50, 200, 150)
    picture = Image.new("RGB", (451, 300))
    picture.paste((255, 255, 255), where)
    picture.save(tmp_path / "box.png", exif=exif)
    painted = _painted(tmp_path / "clipspace-painted-masked-1.png", (451, 300), where)
    (photo,), _ = read_photos([tmp_path / "box.png"], "template", masks=[painted])
    assert photo.mask is not None and np.array_equal(photo.mask == 1, photo.pixels[:, :, 0] == 255)
    # A mask that the user has made elsewhere is of the photo as it is seen.
    upright = _painted(tmp_path / "mine.png", photo.mask.shape[::-1], (0, 0, 10, 20))
    (mine,), _ = read_photos([tmp_path / "box.png"], "template", masks=[upright])
    assert mine.mask is not None and mine.mask[:20, :10].min() == 1 and mine.mask.sum() == 200


def test_a_mask_that_cannot_be_used_is_told(tmp_path: Path) -> None:
    (tmp_path / "broken.png").write_bytes(b"\x89PNG\r\n\x1a\nnothing")
    other = _painted(tmp_path / "other.png", (300, 300), (0, 0, 9, 9))
    for path, named in ((tmp_path / "broken.png", "cannot be read"), (tmp_path / "no.png", "cannot be read"),
                        (other, "is 300x300, but the photo is 451x300")):  # fmt: skip
        with pytest.raises(SubjectBoothError, match=named) as failure:
            edited(_photo(), PhotoEdit(), path)
        assert is_clean(str(failure.value)) and str(tmp_path) not in str(failure.value)


@pytest.mark.parametrize(
    ("text", "named"),
    [
        ("{", "not valid JSON"),
        ("[" * 100_000, "not valid JSON"),
        ("[]", "not an object"),
        ('{"a.jpg": [0.5, 0.5, 1]}', "'a.jpg' has [0.5, 0.5, 1]"),
        ('{"a.jpg": {"zoom": 1}}', "'a.jpg' has"),
        *(
            (json.dumps({"a.jpg": {"crop": crop}}), "the crop of 'a.jpg' is")
            for crop in (
                [0.5, 0.5], [0.5, 0.5, 0.04], [0.5, 0.5, 1.01], [-0.1, 0.5, 1], [0.5, 2, 1], [0.5, "0.5", 1], "center",
                [True, 0.5, 1], [float("nan"), 0.5, 1], [float("inf"), 0.5, 1], [None, 0, 1], {}, [10**400, 0, 1],
            )
        ),
        ('{"a.jpg": {"mask": 5}}', "the mask of 'a.jpg' is 5"),
        ('{"a.jpg": {"caption": 5}}', "the caption of 'a.jpg' is 5"),
        (json.dumps({"a.jpg": {"caption": "x" * 2001}}), "is 2001 letters"),
        ('{"a.jpg": {"caption": "a\\u0000b"}}', "control character"),
        ('{"a.jpg": {"caption": "\\ud800"}}', "invalid character"),
    ],
)  # fmt: skip
def test_bad_edits_are_told(text: str, named: str) -> None:
    with pytest.raises(SubjectBoothError) as failure:
        parse_edits(text)
    assert named in str(failure.value) and is_clean(str(failure.value)) and len(str(failure.value)) < 400
