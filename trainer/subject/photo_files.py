"""The photos of a subject and their captions, out of files."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path

from .captions import caption_file_of, read_caption
from .notes import Note, join_names, sentences
from .photo import Photo
from .photos import read_photo

CAPTIONS = ("auto", "template", "files")
"""Where captions come from: files where there are some, always the template, always files."""


def read_photos(
    paths: Sequence[Path],
    captions: str,
    before_each: Callable[[], None] = lambda: None,
) -> tuple[list[Photo], list[str]]:
    """Read photos, and their captions where wanted.

    Args:
        paths: picture files.
        captions: one of :data:`CAPTIONS`.
        before_each: called before each picture is read; may raise to stop there.

    Returns:
        The photos, with an empty caption where the template is to be used, and sentences about what was found.

    Raises:
        SubjectBoothError: a picture or a caption file cannot be used.
    """
    photos: list[Photo] = []
    notes: list[Note] = []
    for path in paths:
        before_each()
        name = path.name.encode("utf-8", "replace").decode("utf-8")
        decoded = read_photo(path, name)
        notes.extend(decoded.notes)
        text = caption_file_of(path)
        caption = read_caption(text) if captions == "files" or (captions == "auto" and text.is_file()) else ""
        photos.append(Photo(decoded.pixels, decoded.mask, caption, name))
    return photos, sentences(notes) + caption_notes(paths, captions)


def caption_notes(paths: Sequence[Path], captions: str) -> list[str]:
    """What there is to say about caption files that are missing, or there and not read."""
    files = [caption_file_of(path).name for path in paths if caption_file_of(path).is_file()]
    if captions == "template" and files:
        are = "is a caption file" if len(files) == 1 else "are caption files"
        return [f'There {are} next to the photos ({join_names(files)}), not read because captions is "template".']
    missing = [path.name for path in paths if not caption_file_of(path).is_file()]
    if captions == "auto" and files and missing:
        return [
            f"{join_names(missing)} {'has' if len(missing) == 1 else 'have'} no caption file: prompt_template is used."
        ]
    return []
