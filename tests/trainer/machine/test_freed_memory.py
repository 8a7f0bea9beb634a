"""Memory that is free again."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest
import torch

from subjectbooth.trainer.machine.out_of_memory import return_freed_memory


def _resident_bytes() -> int:
    lines = Path("/proc/self/status").read_text("ascii").splitlines()
    return next(1024 * int(line.split()[1]) for line in lines if line.startswith("RssAnon:"))


@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="the C library of Linux")
def test_freed_tensors_go_back_to_the_system() -> None:
    """Tensors below the size of which the C library maps each by itself, with some that stay in between."""
    tensors = [torch.ones(25_000) for _ in range(2_000)]  # 200 MB
    kept = tensors[::20]
    del tensors
    before = _resident_bytes()
    return_freed_memory()
    assert before - _resident_bytes() > 150e6
    assert all(bool((tensor == 1).all()) for tensor in kept)
