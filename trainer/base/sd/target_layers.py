"""The layers of a UNet and of a CLIP text encoder that get a LoRA."""

from __future__ import annotations

import torch
from torch import nn

from ...errors import SubjectBoothError
from ...topics import Topic

ATTENTION = ("to_q", "to_k", "to_v", "to_out.0")
"""The projections of every attention block, as in the LoRA paper and diffusers' DreamBooth script."""
MLP = ("ff.net.0.proj", "ff.net.2")
"""The two layers of every transformer block's MLP."""

TEXT_ATTENTION = ("q_proj", "k_proj", "v_proj", "out_proj")
TEXT_MLP = ("fc1", "fc2")


def target_layers(module: nn.Module, lora_targets: str) -> dict[str, nn.Module]:
    """The layers of a UNet by name, in module order; see ``lora_targets`` of :class:`trainer.config.TrainConfig`.

    Raises:
        SubjectBoothError: the UNet has no such layer.
    """
    if lora_targets == "all":
        layers = {name: layer for name, layer in module.named_modules() if _is_linear_or_1x1(layer)}
    else:
        endings = ATTENTION + (MLP if lora_targets == "attention+mlp" else ())
        layers = {
            name: layer
            for name, layer in module.named_modules()
            if name.endswith(tuple(f".{ending}" for ending in endings))
        }
    if not layers:
        raise SubjectBoothError(
            "the model has no layers to train",
            "a UNet with attention",
            "use a Stable Diffusion checkpoint",
            about=Topic.UNET,
        )
    return layers


def text_target_layers(module: nn.Module, lora_targets: str, used: int | None = None) -> dict[str, nn.Module]:
    """The layers of a CLIP text encoder by name; "all" means attention and MLP here.

    Args:
        used: number of layers that affect the encoded prompt (:func:`trainer.base.sd.text_encoder.used_layers`); the
            layers after them would never get a gradient. None for all.
    """
    endings = TEXT_ATTENTION if lora_targets == "attention" else TEXT_ATTENTION + TEXT_MLP
    return {
        name: layer
        for name, layer in module.named_modules()
        if name.rsplit(".", 1)[-1] in endings and (used is None or _encoder_layer(name) < used)
    }


def _encoder_layer(name: str) -> int:
    """``"text_model.encoder.layers.3.mlp.fc1"`` -> 3."""
    return int(name.partition("encoder.layers.")[2].partition(".")[0])


def _is_linear_or_1x1(layer: nn.Module) -> bool:
    return isinstance(layer, torch.nn.Linear) or (isinstance(layer, torch.nn.Conv2d) and layer.kernel_size == (1, 1))
