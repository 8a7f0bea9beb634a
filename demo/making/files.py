"""Files that a kill leaves whole: the old one or the new one, never half of it.

trainer/files/storage.py does the same and more, but this package goes by two names (`demo.making` in a shell,
`subjectbooth.demo.making` in the tests), and no one import finds it from both.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch


@contextmanager
def whole(path: Path) -> Iterator[Path]:
    """A place to write to; it becomes *path* at the end of the block, and not if the block fails."""
    part = path.with_suffix(".part")
    yield part
    part.replace(path)


def save(path: Path, state: dict[str, Any]) -> None:
    """Write a working state (outside git)."""
    with whole(path) as part:
        torch.save(state, part)
