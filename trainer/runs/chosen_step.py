"""A step that the user chose as the result, in place of the run's own: finds its adapter, or names those that exist."""

from __future__ import annotations

from pathlib import Path

from ..errors import SubjectBoothError
from .folder import RunFolder


def chosen_lora(folder: RunFolder, step: int, steps: int) -> Path:
    """The adapter of a step that a run keeps.

    Args:
        folder: the run's folder.
        step: the chosen step.
        steps: the planned steps.

    Raises:
        SubjectBoothError: the adapter is missing or damaged; the error names the nearest steps that can be chosen.
    """
    kept = [one for one in folder.kept_steps() if one <= steps]
    if step in kept and folder.lora_is_valid(step):
        return folder.lora_path(step)
    nearest = _nearest(folder, [one for one in kept if one != step], step)
    if not nearest:
        raise SubjectBoothError(
            f"use_step {step}, but this run has no LoRA of any step yet",
            "a trained run: other photos, settings or another model are another run",
            "set use_step to 0 and train it",
            "use_step",
        )
    if step in kept:
        given = f"use_step {step}, but {folder.lora_path(step).name} is damaged"
    elif step > steps:
        given = f"use_step {step} with {steps} steps"
    elif step > kept[-1]:
        given = f"use_step {step}, but this run is trained up to step {kept[-1]} so far"
    else:
        given = f"use_step {step}, but this run has not kept the LoRA of that step"
    raise SubjectBoothError(
        given,
        "a step whose LoRA is in the run's folder (one for each validation_interval, and the last)",
        f"use {' or '.join(map(str, nearest))}, the nearest, or 0 for the run's own result",
        "use_step",
    )


def _nearest(folder: RunFolder, kept: list[int], step: int) -> list[int]:
    """The last valid step before a step, and the first after it."""
    before = next((one for one in reversed(kept) if one < step and folder.lora_is_valid(one)), None)
    after = next((one for one in kept if one > step and folder.lora_is_valid(one)), None)
    return [one for one in (before, after) if one is not None]
