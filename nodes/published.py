"""Tracks the LoRAs that the trainer node has published, so that the next run notices deleted or changed files.

ComfyUI caches nodes whose inputs have not changed: without this, a deleted file would never be published again.
"""

from __future__ import annotations

import threading
from collections import Counter
from pathlib import Path

_files: dict[Path, tuple[str, tuple[int, int]]] = {}
_lost: Counter[str] = Counter()
_replaced: Counter[tuple[str, int]] = Counter()
_lock = threading.Lock()


def remember(output_name: str, path: Path, use_step: int) -> None:
    """Record that ``path`` was just published under that name, for this ``use_step``."""
    found = _state(path)
    if found is not None:
        with _lock:
            if path in _files and _files[path] != (output_name, found):
                _replaced[output_name, use_step] += 1
            _files[path] = (output_name, found)


def lost_files(output_name: str | None) -> int:
    """How many published files were found deleted or changed so far; a new number makes the node run again.

    Args:
        output_name: count only files published under this name; None (linked, not known yet) counts all.
    """
    with _lock:
        for path, (name, state) in list(_files.items()):
            if output_name in (None, name) and _state(path) != state:
                del _files[path]  # the next run publishes it again, or fails and is repeated
                _lost[name] += 1
        return sum(_lost.values()) if output_name is None else _lost[output_name]


def replaced_files(output_name: str | None, use_step: int | None) -> int:
    """How often a file under that name was replaced for another ``use_step``: what is cached for this one is stale.

    Args:
        output_name: None (linked, not known yet) counts all names.
        use_step: None (linked) counts all replacements.
    """
    with _lock:
        return sum(
            count
            for (name, step), count in _replaced.items()
            if output_name in (None, name) and (use_step is None or step != use_step)
        )


def _state(path: Path) -> tuple[int, int] | None:
    """Modification time and size; None if the file does not exist."""
    try:
        found = path.stat()
    except OSError:
        return None
    return found.st_mtime_ns, found.st_size
