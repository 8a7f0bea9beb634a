"""Which LoRAs the trainer's node has published, so that one that is gone or was changed is noticed at the next run.

ComfyUI's own cache answers for a node whose inputs are the same: without this, a deleted file would never come back.
"""

from __future__ import annotations

import threading
from collections import Counter
from pathlib import Path

_files: dict[Path, tuple[str, tuple[int, int]]] = {}
_lost: Counter[str] = Counter()
_lock = threading.Lock()


def remember(output_name: str, path: Path) -> None:
    """``path`` was just published under that name."""
    found = _state(path)
    if found is not None:
        with _lock:
            _files[path] = (output_name, found)


def losses(output_name: str | None) -> int:
    """How often by now a published file was found to be gone or changed: another number makes the node run again.

    Args:
        output_name: counts only what was published under it; None (it is linked, and not known yet) counts everything.
    """
    with _lock:
        for path, (name, state) in list(_files.items()):
            if output_name in (None, name) and _state(path) != state:
                del _files[path]  # the run that this leads to publishes it again, or ends in an error and is repeated
                _lost[name] += 1
        return sum(_lost.values()) if output_name is None else _lost[output_name]


def _state(path: Path) -> tuple[int, int] | None:
    """Time of the last change and size; None when the file is not there."""
    try:
        found = path.stat()
    except OSError:
        return None
    return found.st_mtime_ns, found.st_size
