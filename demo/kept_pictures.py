"""Pictures of a measurement, kept with what made them, so that another judge needs no new ones."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from safetensors.torch import save_file

Pictures = dict[str, torch.Tensor]
"""Of each part, float32 [n, 3, 64, 64] in 0..1, as they come from PNG files."""


def keep_pictures(path: Path, made: Pictures, how: dict[str, Any]) -> None:
    """Write *made* by *how* (JSON). Nothing half written is ever seen under *path*."""
    path.parent.mkdir(parents=True, exist_ok=True)
    part = path.with_suffix(".part")
    bytes_of = {name: (pictures * 255).round().to(torch.uint8) for name, pictures in made.items()}
    save_file(bytes_of, part, {"how": json.dumps(how)})
    part.replace(path)


def kept_pictures(path: Path, how: dict[str, Any]) -> Pictures | None:
    """What :func:`keep_pictures` was given, bit for bit; None if there is nothing or it was made otherwise."""
    if not path.exists():
        return None
    with safe_open(path, "pt") as handle:
        if json.loads((handle.metadata() or {}).get("how", "null")) != how:
            return None
        return {name: handle.get_tensor(name).float() / 255 for name in handle.keys()}
