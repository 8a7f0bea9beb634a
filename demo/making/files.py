"""Atomic file writes.

trainer/files/storage.py does the same and more, but this package has two names (`demo.making` on the command line,
`subjectbooth.demo.making` in the tests), and no single import works with both.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch


@contextmanager
def atomic_path(path: Path) -> Iterator[Path]:
    """A temporary path to write to; it is renamed to *path* if the block succeeds."""
    part = path.with_suffix(".part")
    yield part
    part.replace(path)


def save(path: Path, state: dict[str, Any]) -> None:
    """Save a training state (outside git)."""
    with atomic_path(path) as part:
        torch.save(state, part)
