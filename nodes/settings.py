"""Node inputs generated from the trainer's settings, which define range, default and tooltip in one place."""

from __future__ import annotations

import dataclasses
from typing import Any

from comfy_api.latest import io

from ..trainer.config import TrainConfig

SETTINGS = {setting.name: setting for setting in dataclasses.fields(TrainConfig)}


def setting_input(
    name: str, step: float = 1, round: float | None = None, optional: bool = False, zero: str = ""
) -> Any:
    """The node input for a setting of the trainer; its type follows from the default.

    Args:
        step: increment of the arrow buttons.
        round: precision of floats; without it ComfyUI shows one decimal, and 1e-4 as 0.0.
        optional: for a setting that came later, so that API prompts from before it still validate.
        zero: what 0 means, for a number that the trainer wants to be greater; replaced before it gets there.
    """
    setting = SETTINGS[name]
    help, choices = setting.metadata["help"], setting.metadata["choices"]
    low, high = setting.metadata["low"], setting.metadata["high"]
    if zero:
        help, low = f"{help} 0: {zero}.", 0
    if choices:
        return io.Combo.Input(name, options=list(choices), default=setting.default, tooltip=help, optional=optional)
    if isinstance(setting.default, bool):
        return io.Boolean.Input(name, default=setting.default, tooltip=help)
    if isinstance(setting.default, int):
        return io.Int.Input(
            name,
            default=setting.default,
            min=int(low),
            max=int(high),
            step=int(step),
            tooltip=help,
            optional=optional,
            control_after_generate=False,
        )
    return io.Float.Input(
        name, default=setting.default, min=low, max=high, step=step, round=round, tooltip=help, optional=optional
    )


def config_from(values: dict[str, Any], resolution: int) -> TrainConfig:
    """The trainer's settings from a node's inputs; other inputs are ignored.

    Raises:
        SubjectBoothError: a value is out of range.
    """
    chosen = {name: value for name, value in values.items() if name in SETTINGS}
    prompts = [line.strip() for line in str(chosen.get("validation_prompts", "")).splitlines()]
    chosen["validation_prompts"] = tuple(prompt for prompt in prompts if prompt)
    chosen["resolution"] = resolution
    return TrainConfig(**chosen)
