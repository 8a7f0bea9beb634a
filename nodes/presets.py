"""Settings of the trainer for common subjects. A preset only replaces values: the same values have the same run key."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from ..trainer.errors import check_choice

CUSTOM = "custom"
"""The node's own values; also what workflows from before presets mean."""

_NAMES = ("steps", "learning_rate", "rank", "network_alpha", "prior_loss_weight")

PRESETS: dict[str, dict[str, Any]] = {
    name: dict(zip(_NAMES, values, strict=True))
    for name, values in {
        # A first look. 5e-4 and rank 8: ComfyUI's own TrainLoraNode.
        "fast test": (100, 5e-4, 8, 8.0, 1.0),
        # diffusers' LoRA DreamBooth example: 500 steps at 1e-4. The same as the defaults.
        "object": (500, 1e-4, 16, 16.0, 1.0),
        # EasyPhoto: 200 steps per photo, at most 800. DreamBooth's paper: about 1,000 for mostly dogs and cats.
        "pet": (800, 1e-4, 16, 16.0, 1.0),
        # "Training Stable Diffusion with DreamBooth using Diffusers" (Hugging Face): 800 to 1,200 steps for a face, and
        # keeping the class matters more than for objects. Rank 32: ai-toolkit.
        "face": (1000, 1e-4, 32, 32.0, 1.0),
        # ai-toolkit and Lora-Training-in-Comfy: rank and alpha 32 at 1e-4. A style is more than a subject to learn.
        "drawing style": (1200, 1e-4, 32, 32.0, 1.0),
    }.items()
}
"""Values by preset, for photo models (Stable Diffusion 1.5 and later) at a batch size of 1."""


def with_preset(settings: Mapping[str, Any], preset: str) -> dict[str, Any]:
    """The settings with those of a preset in place of their own.

    Raises:
        SubjectBoothError: there is no such preset.
    """
    check_choice("preset", preset, (CUSTOM, *PRESETS))
    return {**settings, **PRESETS.get(preset, {})}


def described(preset: str) -> str:
    """One line: "pet: 800 steps, learning_rate 0.0001, rank 16, ..."."""
    values = PRESETS[preset]
    rest = ", ".join(f"{name} {value:g}" for name, value in values.items() if name != "steps")
    return f"{preset}: {values['steps']} steps, {rest}"


TOOLTIP = (
    "Sets steps, learning_rate, rank, alpha and prior_weight for a photo model. custom: the node's own values. "
    + "; ".join(f"{name}: {v['steps']} steps, {v['learning_rate']:g}, rank {v['rank']}" for name, v in PRESETS.items())
    + ". A preset is where to start from; sources: see the node's help."
)
