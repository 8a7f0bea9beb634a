"""Images of an evaluation, saved with their settings, so that another judge can score them without a new run."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch

from . import files

Pictures = dict[str, torch.Tensor]
"""Images by part, float32 [n, 3, 64, 64] in 0..1, as read from PNG files."""


def keep_pictures(path: Path, made: Pictures, how: dict[str, Any]) -> None:
    """Save the images *made* as bytes, with the settings *how*."""
    bytes_of = {name: (pictures * 255).round().to(torch.uint8) for name, pictures in made.items()}
    files.save(path, {"how": how, "made": bytes_of})


def kept_pictures(path: Path, how: dict[str, Any]) -> Pictures | None:
    """The images saved by :func:`keep_pictures`, bit for bit; None if there are none with the same settings."""
    if not path.exists():
        return None
    kept = torch.load(path, weights_only=True)
    if kept["how"] != how:
        return None
    return {name: pictures.float() / 255 for name, pictures in kept["made"].items()}
