"""Read photos and their captions from files."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path

from .captions import caption_file_of, read_caption
from .notes import Note, join_names, sentences
from .photo import Photo
from .photo_edits import PhotoEdit, edited
from .photos import read_photo

CAPTIONS = ("auto", "template", "files")
"""Source of the captions: caption files if they exist, always the template, or always files."""


def read_photos(
    paths: Sequence[Path],
    captions: str,
    before_each: Callable[[], None] = lambda: None,
    edits: Sequence[PhotoEdit] = (),
    masks: Sequence[Path | None] = (),
) -> tuple[list[Photo], list[str]]:
    """Read photos and their captions.

    Args:
        paths: image files.
        captions: one of :data:`CAPTIONS`.
        before_each: called before each image is read; may raise to stop.
        edits: one per file, whose captions take precedence over caption files; empty for none.
        masks: one per file, which the edits name; empty for none.

    Returns:
        The photos (an empty caption means: use the template), and notes for the user.

    Raises:
        SubjectBoothError: an image or a caption file cannot be used.
    """
    photos: list[Photo] = []
    notes: list[Note] = []
    nothing = [None] * len(paths)
    for path, edit, mask in zip(paths, edits or [PhotoEdit()] * len(paths), masks or nothing, strict=True):
        before_each()
        name = path.name.encode("utf-8", "replace").decode("utf-8")
        decoded = read_photo(path, name)
        notes.extend(decoded.notes)
        text = caption_file_of(path)
        is_read = not edit.caption and (captions == "files" or (captions == "auto" and text.is_file()))
        caption = read_caption(text) if is_read else ""
        photo = Photo(decoded.pixels, decoded.mask, caption, name)
        photos.append(edited(photo, edit, mask, decoded.orientation))
    return photos, sentences(notes) + caption_notes(paths, captions)


def caption_notes(paths: Sequence[Path], captions: str) -> list[str]:
    """Notes about caption files that are missing or ignored."""
    files = [caption_file_of(path).name for path in paths if caption_file_of(path).is_file()]
    if captions == "template" and files:
        are = "The caption file {} is" if len(files) == 1 else "The caption files {} are"
        return [f'{are.format(join_names(files))} ignored because captions is "template".']
    missing = [path.name for path in paths if not caption_file_of(path).is_file()]
    if captions == "auto" and files and missing:
        return [
            f"{join_names(missing)} {'has' if len(missing) == 1 else 'have'} no caption file: prompt_template is used."
        ]
    return []
