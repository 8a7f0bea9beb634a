"""Running out of memory is not the end of a run: it steps down, and reports it, and goes on from the last good step."""

from __future__ import annotations


def step_down(chosen: dict[str, str], pictures: int, eight_bit: bool = False) -> str | None:
    """Choose the next setting that needs less memory, in place.

    First gradient checkpointing, which changes no result, then fewer pictures a forward pass with their gradients
    summed up, which changes rounding only (and what the LoRA's dropout leaves out), and last the 8-bit optimizer. A
    batch is never smaller than one picture.

    Args:
        chosen: what the run uses now.
        pictures: of one whole batch, class images included.
        eight_bit: the 8-bit optimizer can be used here.

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
    if eight_bit and chosen["optimizer"] == "adamw":
        chosen["optimizer"] = "adamw8bit"
        return "out of memory: the optimizer is adamw8bit from here on, and its averages start anew"
    return None
