"""Keeps in memory what was read from files, so that each is read again only after it has changed."""

from __future__ import annotations

import threading
from collections.abc import Callable
from pathlib import Path
from typing import Generic, TypeVar

Value = TypeVar("Value")
Stamp = tuple[int, int]

MOST_KEPT = 5000
"""Files whose values are kept, at most; the ones that were not needed for longest are forgotten."""


class KeptReads(Generic[Value]):
    """Calls ``read`` once for each version of a file, told by its modification time and size.

    Args:
        read: reads a file; called for missing files too, and not again until there is one.
        most: number of values that are kept.
    """

    def __init__(self, read: Callable[[Path], Value], most: int = MOST_KEPT) -> None:
        self._read = read
        self._most = most
        self._kept: dict[Path, tuple[Stamp | None, Value]] = {}
        self._lock = threading.Lock()

    def __call__(self, path: Path) -> Value:
        """The value of the file as it is now."""
        stamp = _stamp(path)  # before the content, so that a change in between is noticed the next time
        with self._lock:
            kept = self._kept.pop(path, None)
            if kept is not None and kept[0] == stamp:
                self._kept[path] = kept  # as the latest
                return kept[1]
        value = self._read(path)
        with self._lock:
            self._kept[path] = stamp, value
            while len(self._kept) > self._most:
                del self._kept[next(iter(self._kept))]
        return value


def _stamp(path: Path) -> Stamp | None:
    try:
        about = path.stat()
    except OSError:
        return None
    return about.st_mtime_ns, about.st_size
