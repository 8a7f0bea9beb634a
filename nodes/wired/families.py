"""What is known about the families that are trained on as they are connected: the only place that names one."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from comfy.model_patcher import ModelPatcher


@dataclass(frozen=True)
class WiredFamily:
    """Defaults of a family, each with its source in :data:`FAMILIES`.

    Attributes:
        name: as users know it.
        architecture: ModelSpec's name.
        resolution: side of the images it was trained on, in pixels.
        guidance_scale: usual for sampling with it; 1 for models that take guidance as an input or are distilled.
        logit_normal: whether a flow's times are logit-normal or uniform, before the model's own shift.
        scheduler: of ComfyUI, for validation images.
        training_options: options of a prompt in training that differ from those of sampling.
        kohya_names: a pattern of the names of layers in kohya's files; empty where paths in the model serve.
        is_tried: whether a small model of the family was trained in the tests.
    """

    name: str
    architecture: str
    resolution: int = 1024
    guidance_scale: float = 4.0
    logit_normal: bool = True
    scheduler: str = "simple"
    training_options: Mapping[str, Any] = field(default_factory=dict)
    kohya_names: str = ""
    is_tried: bool = True


BASE_CLASS = "BaseModel"
"""ComfyUI's class for Stable Diffusion 1.x and 2.x, from which every other is derived."""

FAMILIES: dict[str, WiredFamily] = {
    "SD3": WiredFamily("SD 3.5", "stable-diffusion-3.5"),  # logit-normal: arXiv 2403.03206, section 5.3.2
    # Guidance 1 in training: sd-scripts, docs/flux_train_network.md.
    "Flux": WiredFamily("Flux.1", "flux-1-dev", guidance_scale=1.0, training_options={"guidance": 1.0}),
    "Flux2": WiredFamily("Flux.2", "flux-2"),
    "Lumina2": WiredFamily("Z-Image", "z-image"),
    "QwenImage": WiredFamily("Qwen-Image", "qwen-image"),
    "Chroma": WiredFamily("Chroma", "chroma"),
    "SDXL": WiredFamily(
        "SDXL", "stable-diffusion-xl-v1-base", guidance_scale=7.0, kohya_names=r"lora_unet_(input|middle|output)_block"
    ),
    "BaseModel": WiredFamily(
        "SD 1.x or 2.x", "stable-diffusion-v1", 512, 7.0, kohya_names=r"lora_unet_(down|mid|up)_block"
    ),
}
"""By the class of ComfyUI's model (``comfy.model_base``)."""


def family_of(model: ModelPatcher) -> WiredFamily:
    """The family of a connected model; for one that is not in the table, ComfyUI's name for it and the defaults."""
    kinds = [kind.__name__ for kind in type(model.model).__mro__]
    found = next((kind for kind in kinds if kind in FAMILIES), "")
    if found and (found != BASE_CLASS or found == kinds[0]):
        return FAMILIES[found]
    name = type(model.model).__name__
    return WiredFamily(name, name.lower(), is_tried=False)
