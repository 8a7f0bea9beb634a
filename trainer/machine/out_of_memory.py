"""Detecting out-of-memory errors, reporting free memory, and releasing memory after a failed attempt."""

from __future__ import annotations

import ctypes
import gc
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import torch

from ..errors import SubjectBoothError

# Messages of torch on devices without an exception class for it (CPU, MPS, DirectML), and of CUDA's libraries if they
# cannot allocate a workspace.
_MESSAGES = ("out of memory", "not enough memory", "can't allocate memory", "status_alloc_failed")

_CUDA_ERROR_MEMORY_ALLOCATION = 2


def is_out_of_memory(error: BaseException) -> bool:
    """Whether ``error`` means that an allocation failed, on any device that torch supports."""
    if isinstance(error, MemoryError):
        return True
    # torch.OutOfMemoryError is new in torch 2.5.
    out_of_memory = getattr(torch, "OutOfMemoryError", torch.cuda.OutOfMemoryError)
    accelerator = getattr(torch, "AcceleratorError", None)  # since torch 2.9: any device error, including out of memory
    if isinstance(error, out_of_memory):
        return True
    if accelerator is not None and isinstance(error, accelerator):
        if getattr(error, "error_code", None) == _CUDA_ERROR_MEMORY_ALLOCATION:
            return True
    elif not isinstance(error, RuntimeError):
        return False
    return any(message in str(error).lower() for message in _MESSAGES)


@contextmanager
def memory_errors(given: str, needed: str, todo: str, where: str = "") -> Iterator[None]:
    """Raise a :class:`SubjectBoothError` with these parts if an allocation in the block fails."""
    try:
        yield
    except Exception as error:
        if not is_out_of_memory(error):
            raise
        raise SubjectBoothError(given, needed, todo, where) from error


def free_bytes(device: torch.device) -> int | None:
    """Free bytes on ``device``, or None if unknown. A host with a memory manager of its own passes its own function."""
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
    """Release memory that a failed attempt still holds."""
    gc.collect()
    if device.type == "cuda":
        torch.cuda.empty_cache()
    elif device.type == "mps":
        torch.mps.empty_cache()


def return_freed_memory() -> None:
    """Give the system back what the C library keeps of freed tensors, on Linux with glibc; elsewhere nothing.

    After text encoder and VAE are gone, that is half a gigabyte with Stable Diffusion 1.5.
    """
    if not sys.platform.startswith("linux"):
        return
    trim = getattr(ctypes.CDLL(None), "malloc_trim", None)  # musl has none
    if trim is not None:
        trim(0)
