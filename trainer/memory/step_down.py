"""Out of memory, a run lowers its settings, reports that, and tries the same step again."""

from __future__ import annotations

from dataclasses import replace

from ..machine.resolved_settings import ResolvedSettings


def step_down(chosen: ResolvedSettings, pictures: int, eight_bit: bool = False) -> tuple[ResolvedSettings, str] | None:
    """The next settings that need less memory.

    First gradient checkpointing, which does not change the result; then smaller micro-batches, which change only
    rounding (and the pattern of dropout); last the 8-bit optimizer.

    Args:
        chosen: the current settings.
        pictures: images in a batch, class images included.
        eight_bit: whether the 8-bit optimizer is available.

    Returns:
        the settings and a note for the user, or None if no setting is left to lower.
    """
    if not chosen.gradient_checkpointing:
        return replace(chosen, gradient_checkpointing=True), "out of memory: gradient checkpointing is now on"
    now = min(chosen.micro_batch, pictures)
    if now > 1:
        half = (now + 1) // 2
        return replace(chosen, micro_batch=half), f"out of memory: the micro-batch size is now {half} instead of {now}"
    if eight_bit and chosen.optimizer == "adamw":
        note = "out of memory: the optimizer is now adamw8bit, starting with empty state"
        return replace(chosen, optimizer="adamw8bit"), note
    return None
