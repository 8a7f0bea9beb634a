"""Running out of memory is not the end of a run: it lowers its settings, reports it, and continues from the last good
step."""

from __future__ import annotations

from dataclasses import replace

from ..machine.resolved_settings import ResolvedSettings


def step_down(chosen: ResolvedSettings, pictures: int, eight_bit: bool = False) -> tuple[ResolvedSettings, str] | None:
    """The next settings that need less memory.

    First gradient checkpointing, which changes no result, then smaller micro-batches with their gradients summed up,
    which changes rounding only (and what the LoRA's dropout leaves out), and last the 8-bit optimizer. A micro-batch is
    never smaller than one picture.

    Args:
        chosen: what the run uses now.
        pictures: of one whole batch, class images included.
        eight_bit: the 8-bit optimizer can be used here.

    Returns:
        The settings and a sentence for the user, or None when there is nothing left to try.
    """
    if not chosen.gradient_checkpointing:
        return replace(chosen, gradient_checkpointing=True), "out of memory: gradient checkpointing is now on"
    now = min(chosen.micro_batch, pictures)
    if now > 1:
        half = (now + 1) // 2
        return replace(chosen, micro_batch=half), f"out of memory: {half} pictures at once instead of {now}"
    if eight_bit and chosen.optimizer == "adamw":
        note = "out of memory: the optimizer is adamw8bit from here on, and its averages start anew"
        return replace(chosen, optimizer="adamw8bit"), note
    return None
