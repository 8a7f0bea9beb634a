"""What the pictures of an evaluation are compared with: a connected CLIP_VISION, or the judge of the demo base."""

from __future__ import annotations

import importlib
from collections.abc import Sequence
from typing import Any

import torch
from comfy.model_patcher import ModelPatcher
from safetensors import SafetensorError, safe_open

from ..demo.base import WEIGHTS
from ..trainer.errors import SubjectBoothError
from ..trainer.measure.embedding import Embedder
from ..trainer.measure.prompts import OTHER_PROMPTS
from .bridge import to_cpu_float32
from .host import stop_if_cancelled
from .wired_checks import UNET_PREFIX

BATCH = 16
"""Pictures per forward pass; ComfyUI loads the model once for all of them."""


def embedder_for(clip_vision: Any, model: ModelPatcher) -> tuple[Embedder | None, Sequence[str]]:
    """What compares the pictures, and prompts of other things that the base knows.

    The connected CLIP_VISION; without one, the judge if this is the demo base, and None otherwise. The judge is part of
    the repository, and not of the published pack.
    """
    compares = None if clip_vision is None else ClipVisionEmbedder(clip_vision)
    if not _is_demo_base(model):
        return compares, OTHER_PROMPTS
    try:
        judge, demo = (
            importlib.import_module(f"..demo.making.{name}", __package__) for name in ("judge", "judge_embedder")
        )
        return compares or demo.JudgeEmbedder(judge.LoadedJudge()), demo.OTHER_CAPTIONS
    except (ImportError, OSError, SafetensorError):
        return compares, OTHER_PROMPTS


class ClipVisionEmbedder:
    """Embeds pictures as ComfyUI's own CLIP Vision Encode does: CLIP or DINOv2.

    Args:
        clip_vision: the connected model.
    """

    def __init__(self, clip_vision: Any) -> None:
        self._clip_vision = clip_vision
        kind = type(getattr(clip_vision, "model", clip_vision)).__name__
        self.name = "DINOv2" if "dino" in kind.lower() else "CLIP"

    def embed(self, images: torch.Tensor) -> torch.Tensor:
        """Unit vectors float32 [n, d] on the CPU of images float32 [n, 3, h, w] in 0..1.

        Raises:
            SubjectBoothError: the model does not embed a picture as one finite vector.
            Cancelled: the user pressed cancel.
        """
        vectors = []
        for part in images.split(BATCH):
            stop_if_cancelled()
            with torch.inference_mode():
                found = self._clip_vision.encode_image(part.movedim(1, -1))["image_embeds"]
            if found is None or found.ndim != 2 or not torch.isfinite(found).all():
                raise SubjectBoothError(
                    "the model at clip_vision does not give one finite vector for each picture",
                    "a model that embeds pictures",
                    "connect CLIP or DINOv2 with Load CLIP Vision",
                    "clip_vision",
                )
            vectors.append(to_cpu_float32(found))
        return torch.nn.functional.normalize(torch.cat(vectors), dim=1)


def _is_demo_base(model: ModelPatcher) -> bool:
    """By the bias of the UNet's last layer, which LoRAs do not change."""
    bias = model.model_state_dict(UNET_PREFIX).get(f"{UNET_PREFIX}out.2.bias")
    try:
        with safe_open(WEIGHTS, "pt") as file:
            expected = file.get_tensor("unet.out.2.bias").float()
    except (OSError, SafetensorError):
        return False
    return bias is not None and bias.shape == expected.shape and torch.equal(bias.float().cpu(), expected)
