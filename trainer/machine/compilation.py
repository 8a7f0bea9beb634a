"""torch.compile for the repeated blocks of a network, in training steps only.

Blocks of one kind share a compiled function, so that a network of many blocks compiles in the time of a few. Whatever
runs between steps (validation images, scores) has other shapes, and runs as it is.
"""

from __future__ import annotations

import importlib.util
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from types import MethodType
from typing import Any

import torch
from torch import nn

from ..config import AUTO

BACKEND = "inductor"

PAYS_FROM = 8000
"""Steps of one image of 512 pixels from which ``auto`` compiles: 8,000 for SD 1.5, 2,000 at the 1024 pixels of SDXL.
Compiling takes about a minute; published gains of compiled blocks are 5 to 20 % of a step. Not measured by us."""

MOST_SHAPES = 64
"""Compiled variants of a kind of block; torch's own limit, of 8, is below the shapes in a UNet."""


def choose_compile(requested: str, device: torch.device, steps: int, pictures: int, pixels: int) -> tuple[bool, str]:
    """Whether to compile, and a note if that differs from the request (otherwise empty).

    Args:
        requested: the setting ``compile``.
        steps: steps that are left.
        pictures: images in a step.
        pixels: of the largest image.
    """
    if requested == "off":
        return False, ""
    if not hasattr(torch, "compile") or not _is_supported():
        missing = "" if requested == AUTO else "torch.compile is not available here; this run does not compile"
        return False, missing
    if requested == "on":
        return True, ""
    pays = steps * pictures * pixels / 512**2 >= PAYS_FROM
    return pays and device.type == "cuda" and importlib.util.find_spec("triton") is not None, ""


def _is_supported() -> bool:
    try:
        import torch._dynamo as dynamo

        dynamo.eval_frame.check_if_dynamo_supported()
    except Exception:  # another version of Python or of the system
        return False
    return True


class CompiledBlocks:
    """The blocks of a network, which are compiled at their first call inside :meth:`used`.

    Args:
        blocks: modules without hooks or a ``forward`` of their own.
    """

    def __init__(self, blocks: Sequence[nn.Module]) -> None:
        self._blocks = tuple(blocks)
        # Shapes are fixed: with one that changes, kernels for any shape would be slower for all.
        self._compiled: dict[type, Callable[..., Any]] = {
            kind: torch.compile(kind.forward, backend=BACKEND, dynamic=False)
            for kind in {type(block) for block in blocks}
        }

    @contextmanager
    def used(self) -> Iterator[None]:
        """Inside, the blocks run compiled."""
        import torch._dynamo as dynamo

        limit = "recompile_limit" if hasattr(dynamo.config, "recompile_limit") else "cache_size_limit"
        try:
            for block in self._blocks:
                block.forward = MethodType(self._compiled[type(block)], block)  # type: ignore[method-assign]
            with dynamo.config.patch({limit: MOST_SHAPES}):
                yield
        finally:
            for block in self._blocks:
                block.__dict__.pop("forward", None)


def why_not(error: BaseException) -> str:
    """A sentence for the user about a compiled step that failed."""
    said = " ".join(line.strip() for line in str(error).splitlines()[:2])  # the first may only name the backend
    return f"torch.compile cannot be used here ({type(error).__name__}: {said[:160]}); this run does not compile"
