"""A CLIP_VISION without a file: ComfyUI's own CLIP in a tiny size, with random weights."""

from __future__ import annotations

import json
import tempfile
from pathlib import Path
from typing import Any

import torch
from comfy.clip_vision import ClipVisionModel

CONFIG = {
    "attention_dropout": 0.0,
    "hidden_act": "quick_gelu",
    "hidden_size": 32,
    "image_size": 28,
    "intermediate_size": 64,
    "layer_norm_eps": 1e-05,
    "model_type": "clip_vision_model",
    "num_attention_heads": 2,
    "num_channels": 3,
    "num_hidden_layers": 2,
    "patch_size": 14,
    "projection_dim": 16,
}


class ProbeClipVision:
    """The model. `broken`: its embeddings are NaN."""

    @classmethod
    def INPUT_TYPES(cls) -> dict[str, Any]:
        return {"required": {"broken": ("BOOLEAN", {"default": False})}}

    RETURN_TYPES = ("CLIP_VISION",)
    CATEGORY = "probe"
    FUNCTION = "probe"

    def probe(self, broken: bool) -> tuple[Any]:
        with tempfile.TemporaryDirectory() as folder:
            path = Path(folder) / "config.json"
            path.write_text(json.dumps(CONFIG), encoding="utf-8")
            model = ClipVisionModel(str(path))
        choose = torch.Generator().manual_seed(5)
        weights = {
            name: torch.full_like(tensor, float("nan"))
            if broken
            else 0.2 * torch.randn(tensor.shape, generator=choose).to(tensor)
            for name, tensor in model.get_sd().items()
            if tensor.is_floating_point()
        }
        model.load_sd(weights)
        return (model,)


NODES = {"ProbeClipVision": ProbeClipVision}
