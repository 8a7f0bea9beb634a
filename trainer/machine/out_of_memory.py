"""Running out of memory is not the end of a run: it steps down, aloud, and goes on from the last good step."""

from __future__ import annotations

import gc
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import torch

from ..errors import SubjectBoothError

# What torch says on devices that have no exception class of their own for it (CPU, MPS, DirectML), and what CUDA's
# libraries say of a workspace of theirs.
_SAID = ("out of memory", "not enough memory", "can't allocate memory", "status_alloc_failed")

_CUDA_ERROR_MEMORY_ALLOCATION = 2


def is_out_of_memory(error: BaseException) -> bool:
    """Whether ``error`` means that an allocation failed. The one place that knows how torch and its devices say so."""
    if isinstance(error, MemoryError):
        return True
    # Torch 2.5 has it under this name; before, it was torch.cuda's alone.
    own = getattr(torch, "OutOfMemoryError", torch.cuda.OutOfMemoryError)
    accelerator = getattr(torch, "AcceleratorError", None)  # torch 2.9: any error of a device, out of memory among them
    if isinstance(error, own):
        return True
    if accelerator is not None and isinstance(error, accelerator):
        if getattr(error, "error_code", None) == _CUDA_ERROR_MEMORY_ALLOCATION:
            return True
    elif not isinstance(error, RuntimeError):
        return False
    return any(words in str(error).lower() for words in _SAID)


@contextmanager
def memory_errors(given: str, needed: str, todo: str, where: str) -> Iterator[None]:
    """Inside, a failed allocation becomes this sentence; its parts are those of :class:`SubjectBoothError`."""
    try:
        yield
    except Exception as error:
        if not is_out_of_memory(error):
            raise
        raise SubjectBoothError(given, needed, todo, where) from error


def free_bytes(device: torch.device) -> int | None:
    """Bytes free on ``device``, None when nobody can say. Inside ComfyUI, ComfyUI is asked instead."""
    if device.type == "cuda":
        free, _ = torch.cuda.mem_get_info(device)
        return free + torch.cuda.memory_reserved(device) - torch.cuda.memory_allocated(device)
    if device.type == "mps":
        if not hasattr(torch.mps, "recommended_max_memory"):  # torch before 2.5
            return None
        return torch.mps.recommended_max_memory() - torch.mps.driver_allocated_memory()
    return _free_system_memory() if device.type == "cpu" else None


def _free_system_memory() -> int | None:
    if sys.platform == "win32":
        return _free_on_windows()
    try:
        lines = Path("/proc/meminfo").read_text("ascii").splitlines()
        return next(1024 * int(line.split()[1]) for line in lines if line.startswith("MemAvailable:"))
    except (OSError, StopIteration, ValueError, IndexError):
        return None


def _free_on_windows() -> int | None:
    import ctypes

    class Status(ctypes.Structure):
        _fields_ = [("length", ctypes.c_ulong), ("load", ctypes.c_ulong)] + [
            (name, ctypes.c_ulonglong)
            for name in ("total", "free", "page_total", "page_free", "total_virtual", "free_virtual", "extended")
        ]

    status = Status(length=ctypes.sizeof(Status))
    windows = getattr(ctypes, "windll", None)
    if windows is None or not windows.kernel32.GlobalMemoryStatusEx(ctypes.byref(status)):
        return None
    return int(status.free)


def free_memory(device: torch.device) -> None:
    """Give back what the failed attempt still holds."""
    gc.collect()
    if device.type == "cuda":
        torch.cuda.empty_cache()
    elif device.type == "mps":
        torch.mps.empty_cache()
