"""Detect folders in kohya's layout, which have repeats and caption words in their names."""

from __future__ import annotations

import re
from collections.abc import Collection
from pathlib import Path

from ..errors import SubjectBoothError

_NAME = re.compile(r"\d+_.+")


def reject_kohya_folder(folder: Path, suffixes: Collection[str]) -> None:
    """Explain what to do with a folder of subfolders such as "10_ohwx dog", the layout of kohya's trainers.

    Raises:
        SubjectBoothError: ``folder`` has such subfolders with images; the message says how to use one of them.
    """
    inner = [
        path
        for path in folder.iterdir()
        if path.is_dir()
        and _NAME.fullmatch(path.name)
        and any(file.suffix.lower() in suffixes for file in path.glob("*"))
    ]
    if not inner:
        return
    first = min(inner, key=lambda path: path.name)
    token, _, class_word = first.name.partition("_")[2].strip().partition(" ")
    words = f'token "{token}", class word "{class_word}"' if class_word else f'token or class word "{token}"'
    others = f" and {len(inner) - 1} more" if len(inner) > 1 else ""
    raise SubjectBoothError(
        f"the folder {folder.name[:80]!r} has no images of its own, but subfolders in kohya's layout: "
        f"{first.name[:80]!r}{others}",
        "the folder that contains the photos",
        f"choose the folder {folder.name[:80]}/{first.name[:80]} ({words}). Repeats are not used; set steps instead",
    )
