"""Running out of memory is not the end of a run: it steps down, aloud, and goes on from the last good step."""

from __future__ import annotations

import gc

import torch

# What torch says on devices that have no exception class of their own for it (CPU, MPS, DirectML).
_SAID = ("out of memory", "not enough memory", "can't allocate memory")


def is_out_of_memory(error: BaseException) -> bool:
    """Whether ``error`` means that an allocation failed."""
    if isinstance(error, (torch.OutOfMemoryError, MemoryError)):
        return True
    return isinstance(error, RuntimeError) and any(words in str(error).lower() for words in _SAID)


def step_down(chosen: dict[str, str], pictures: int) -> str | None:
    """Choose the next setting that needs less memory, in place.

    First gradient checkpointing, which changes no result, then fewer pictures a forward pass with their gradients
    summed up, which changes rounding only. A batch is never smaller than one picture.

    Args:
        chosen: what the run uses now.
        pictures: of one whole batch, class images included.

    Returns:
        A sentence for the user, or None when there is nothing left to try.
    """
    if chosen["gradient_checkpointing"] == "off":
        chosen["gradient_checkpointing"] = "on"
        return "out of memory: gradient checkpointing is now on"
    now = min(int(chosen["pictures_per_forward"]), pictures)
    if now > 1:
        chosen["pictures_per_forward"] = str((now + 1) // 2)
        return f"out of memory: {chosen['pictures_per_forward']} pictures at once instead of {now}"
    return None


def free_memory(device: torch.device) -> None:
    """Give back what the failed attempt still holds."""
    gc.collect()
    if device.type == "cuda":
        torch.cuda.empty_cache()
    elif device.type == "mps":
        torch.mps.empty_cache()
