"""Pictures of a measurement, kept with what made them, so that another judge needs no new ones."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch

from . import files

Pictures = dict[str, torch.Tensor]
"""Of each part, float32 [n, 3, 64, 64] in 0..1, as they come from PNG files."""


def keep_pictures(path: Path, made: Pictures, how: dict[str, Any]) -> None:
    """Write *made*, as bytes, by *how*."""
    bytes_of = {name: (pictures * 255).round().to(torch.uint8) for name, pictures in made.items()}
    files.save(path, {"how": how, "made": bytes_of})


def kept_pictures(path: Path, how: dict[str, Any]) -> Pictures | None:
    """What :func:`keep_pictures` was given, bit for bit; None if there is nothing or it was made otherwise."""
    if not path.exists():
        return None
    kept = torch.load(path, weights_only=True)
    if kept["how"] != how:
        return None
    return {name: pictures.float() / 255 for name, pictures in kept["made"].items()}
