"""Preview for the panel of LoadSubjectImages: the photos as training sees them, warnings and captions."""

from __future__ import annotations

import base64
import contextlib
import functools
import io
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from ..trainer.errors import SubjectBoothError, check_choice
from ..trainer.subject.captions import caption_file_of, check_template, fill_template, read_caption
from ..trainer.subject.checks import Finding, PhotoStats, findings, photo_stats
from ..trainer.subject.crops import CROPS, is_mask_outside_crop, training_square
from ..trainer.subject.notes import Note
from ..trainer.subject.photo import Photo
from ..trainer.subject.photo_edits import NAME as EDITS
from ..trainer.subject.photo_edits import PhotoEdit, edited, unused_note
from ..trainer.subject.photo_files import caption_notes
from ..trainer.subject.photos import read_photo
from ..trainer.subject.subject import check_resolution, mask_outside_crop_warning
from ..trainer.subject.trigger import check_token, check_word
from .photo_sources import Source, edits_of, mask_of

MOST_SHOWN = 48
"""Maximum number of photos in the panel, as each must be decoded."""
THUMBNAIL_SIDE, WHOLE_SIDE = 192, 640
MASK_COLOUR, MASK_SHARE = (60, 130, 255), 0.5
"""How a painted mask is shown on its photo."""
MOST_LETTERS = 300
"""Maximum length of a caption."""


@dataclass(frozen=True)
class PhotoPreview:
    """One photo as the panel shows it.

    Attributes:
        look: measurements for the photo checks.
        thumbnail: the training image as a ``data:`` URL.
        notes: notes from reading the file.
        is_cut: whether the crop cuts off the whole mask.
    """

    look: PhotoStats
    thumbnail: str
    notes: tuple[Note, ...]
    is_cut: bool


def describe_photos(widgets: dict[str, Any]) -> dict[str, Any]:
    """What the node would report for these widget values. Writes nothing and uses no model.

    Args:
        widgets: the node's widget values by name; missing ones count as empty.

    Returns:
        ``photos`` (name, thumbnail, size, warnings and their kinds, the number of its group of near-duplicates, the
        caption from its file, or an error), ``count``, ``warnings`` about the set as a whole, the instance prompt
        and class prompt, and ``problem`` if the node would reject the words.

    Raises:
        SubjectBoothError: the sources or settings cannot be used.
    """
    source = Source.of(widgets.get("images"), widgets.get("folder"), widgets.get("sample"))
    source.check(may_be_none=True)
    resolution, crop = check_resolution(widgets.get("resolution", 512)), widgets.get("crop", CROPS[0])
    check_choice("crop", crop, CROPS)
    paths = source.paths()
    edits = edits_of(widgets.get(EDITS))
    names_in_edits = source.names_in_edits(paths)
    shown = [
        _photo(path, resolution, crop, edits.get(name, PhotoEdit()))
        for path, name in zip(paths[:MOST_SHOWN], names_in_edits, strict=False)
    ]
    seen = [(index, photo) for index, photo in enumerate(shown) if isinstance(photo, PhotoPreview)]
    photos: list[dict[str, Any]] = []
    for path, key, photo in zip(paths, names_in_edits, shown, strict=False):
        entry: dict[str, Any] = {"name": path.name, "key": key, "warnings": [], "kinds": []}
        if widgets.get("whole") == key:
            entry |= _whole(path, edits.get(key, PhotoEdit()))
        if isinstance(photo, PhotoPreview):
            entry |= {
                "thumbnail": photo.thumbnail,
                "width": photo.look.width,
                "height": photo.look.height,
                "warnings": [str(note) for note in photo.notes],
                "kinds": [note.kind for note in photo.notes],
            }
        else:
            entry["error"] = photo
        photos.append(entry)
    warnings = []
    from_files = widgets.get("captions") == "caption files"
    if paths:
        names = [paths[index].name for index, _ in seen]
        cut = tuple(number for number, (_, photo) in enumerate(seen) if photo.is_cut)
        found = findings(names, [photo.look for _, photo in seen], resolution)
        if cut:
            found.append(Finding("cut", mask_outside_crop_warning([names[number] for number in cut], crop), cut))
        groups = 0
        for finding in found:
            groups += finding.kind == "twice"
            for number in finding.photos:
                entry = photos[seen[number][0]]
                entry["warnings"].append(finding.text)
                entry["kinds"].append(finding.kind)
                if finding.kind == "twice":
                    entry["group"] = groups
            if not finding.photos and len(seen) == len(paths):
                warnings.append(finding.text)
        warnings += [
            *caption_notes(paths, "files" if from_files else "template"),
            *unused_note(edits, names_in_edits),
        ]
    words = _words(widgets, source.sample_class_word())
    _add_captions(photos, paths, edits, widgets, words["class_word"])
    return {"photos": photos, "count": len(paths), **words, "warnings": [*warnings, *words["warnings"]]}


def _words(widgets: dict[str, Any], sample_class_word: str) -> dict[str, Any]:
    """The prompts made from token and class word, or why there are none."""
    from .subject import clip_tokenize

    class_word = str(widgets.get("class_word") or "")
    try:
        token = check_word(str(widgets.get("token") or ""), "token", "ohwx")
        class_word = check_word(class_word if class_word.strip() else sample_class_word, "class_word", "dog")
        template = check_template(str(widgets.get("prompt_template") or ""), needs_token=True)
    except SubjectBoothError as error:
        return {"sentence": "", "class_sentence": "", "problem": str(error), "warnings": [], "class_word": ""}
    return {
        "sentence": fill_template(template, token, class_word),
        "class_sentence": fill_template("a photo of a {class}", token, class_word),
        "problem": "",
        "class_word": class_word,
        "warnings": check_token(token, class_word, clip_tokenize()),
    }


def _add_captions(
    photos: list[dict[str, Any]],
    paths: list[Path],
    edits: dict[str, PhotoEdit],
    widgets: dict[str, Any],
    class_word: str,
) -> None:
    """Add each photo's own caption, or an error if its caption file cannot be used."""
    from_files = widgets.get("captions") == "caption files"
    for entry, path in zip(photos, paths, strict=False):
        own = edits.get(entry["key"], PhotoEdit()).caption
        if not (own or from_files):
            continue
        try:
            text = own or read_caption(caption_file_of(path))
            entry["caption"] = fill_template(text, str(widgets.get("token") or ""), class_word)[:MOST_LETTERS]
        except SubjectBoothError as error:
            entry.setdefault("error", str(error))


def _photo(path: Path, resolution: int, crop: str, edit: PhotoEdit) -> PhotoPreview | str:
    """The photo, or why it cannot be read."""
    try:
        about = path.stat()
        mask = mask_of(edit)
        changed = about.st_mtime_ns, about.st_size, mask.stat().st_mtime_ns if mask else 0
        return _preview(path, changed, resolution, crop, edit, mask)
    except SubjectBoothError as error:
        return str(error)
    except OSError as error:
        return f"{path.name} cannot be opened ({error.strerror or type(error).__name__})."


@functools.lru_cache(maxsize=256)
def _preview(
    path: Path, _changed: tuple[int, int, int], resolution: int, crop: str, edit: PhotoEdit, mask: Path | None
) -> PhotoPreview:
    """Cached by modification times and size as well, so that a changed file is read again."""
    decoded = read_photo(path)
    photo = edited(Photo(decoded.pixels, decoded.mask, "", path.name), edit, mask, decoded.orientation)
    pixels, _ = training_square(photo, resolution, crop)
    is_cut = is_mask_outside_crop(photo, (resolution, resolution), crop)
    return PhotoPreview(photo_stats(photo.pixels), data_address(Image.fromarray(pixels)), decoded.notes, is_cut)


def _whole(path: Path, edit: PhotoEdit) -> dict[str, Any]:
    """``whole``, the photo before cropping with its mask in blue, for the panel to crop it; empty if it cannot be read.

    And ``transparent``: whether its own transparency is its mask.
    """
    try:
        decoded = read_photo(path)
    except (SubjectBoothError, OSError):
        return {"whole": ""}
    photo, mask = Photo(decoded.pixels, None, "", path.name), None
    with contextlib.suppress(SubjectBoothError, OSError):  # the photo's own entry reports it
        mask = edited(photo, PhotoEdit(mask=edit.mask), mask_of(edit), decoded.orientation).mask
    pixels = decoded.pixels
    if mask is not None:
        share = MASK_SHARE * mask[:, :, None]
        pixels = (pixels * (1 - share) + np.array(MASK_COLOUR) * share).astype(np.uint8)
    return {"whole": data_address(Image.fromarray(pixels), WHOLE_SIDE), "transparent": decoded.mask is not None}


def data_address(picture: Image.Image, side: int = THUMBNAIL_SIDE) -> str:
    """A JPEG of an image, at most ``side`` pixels wide and high, as a ``data:`` URL, which needs no route."""
    small = picture.convert("RGB")
    small.thumbnail((side, side), Image.Resampling.LANCZOS)
    file = io.BytesIO()
    small.save(file, "JPEG", quality=88)
    return "data:image/jpeg;base64," + base64.b64encode(file.getvalue()).decode("ascii")
