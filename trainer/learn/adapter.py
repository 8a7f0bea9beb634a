"""LoRA in, kohya file out (LoRA: arXiv 2106.09685).

The file is written with kohya's key names, because ComfyUI, A1111 and Forge all read those; files with diffusers' or
PEFT's names load in ComfyUI as nothing at all.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import replace
from typing import TYPE_CHECKING

import torch

from ..config import TrainConfig
from ..errors import SubjectBoothError, require
from ..machine.numerics import seeded
from .checkpoint import Checkpoint

if TYPE_CHECKING:
    from torch import nn

ADAPTER_NAME = "subject"
ATTENTION = ("to_q", "to_k", "to_v", "to_out.0")
"""The projections of every attention block, as in the LoRA paper and diffusers' DreamBooth script."""
MLP = ("ff.net.0.proj", "ff.net.2")
"""The two layers of every transformer block's MLP."""


TEXT_ATTENTION = ("q_proj", "k_proj", "v_proj", "out_proj")
TEXT_MLP = ("fc1", "fc2")


def text_target_layers(module: nn.Module, lora_targets: str, used: int | None = None) -> dict[str, nn.Module]:
    """The same for a CLIP text encoder; "all" is attention and MLP there.

    Args:
        used: how many of the encoder's layers, from the first, the prompt comes from
            (:func:`trainer.base.sd.text_encoder.used_layers`): the others would never get a gradient. None for all.
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


def target_layers(module: nn.Module, lora_targets: str) -> dict[str, nn.Module]:
    """The layers that get a LoRA by name, in the module's order; see ``lora_targets`` of :class:`TrainConfig`.

    Raises:
        SubjectBoothError: the model has none of them.
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
            "a model without layers to train", "a UNet with attention", "wire a Stable Diffusion checkpoint", "MODEL"
        )
    return layers


def _is_linear_or_1x1(layer: nn.Module) -> bool:
    return isinstance(layer, torch.nn.Linear) or (isinstance(layer, torch.nn.Conv2d) and layer.kernel_size == (1, 1))


def check_layers(
    module: nn.Module,
    config: TrainConfig,
    targets: Callable[[nn.Module, str], dict[str, nn.Module]] = target_layers,
) -> dict[str, nn.Module]:
    """The layers that get a LoRA. See :func:`inject`; the module's weights are not looked at.

    Raises:
        SubjectBoothError: the rank is larger than a layer allows, or there is no such layer.
    """
    layers = targets(module, config.lora_targets)
    check_rank(config.rank, min(min(layer.weight.shape[:2]) for layer in layers.values()))  # type: ignore[union-attr,index]
    return layers


def check_rank(rank: int, narrowest: int) -> None:
    """
    Args:
        rank: asked for.
        narrowest: width of the narrowest layer that gets a LoRA.

    Raises:
        SubjectBoothError: the rank is larger.
    """
    if rank > narrowest:
        raise SubjectBoothError(
            f"rank {rank}",
            f"{narrowest} or less, the width of this model's smallest trained layer",
            f"set rank to {narrowest} or lower",
            "rank",
        )


def inject(
    module: nn.Module,
    config: TrainConfig,
    targets: Callable[[nn.Module, str], dict[str, nn.Module]] = target_layers,
) -> list[nn.Parameter]:
    """Put a LoRA beside every target layer, in place, and return what trains.

    The first weights depend on ``config.seed`` alone; the global random state is left as it was. The adapter's weights
    are fp32 whatever the base is kept in: in half, steps of 1e-4 are rounded away.

    Args:
        module: a UNet (or text encoder) whose weights are frozen.
        config: rank, network_alpha, lora_targets, lora_dropout, use_rslora and seed count.
        targets: finds the layers.

    Returns:
        The trainable parameters, in a fixed order: up and down weights, float32.

    Raises:
        SubjectBoothError: the rank is larger than a layer allows, or there is no such layer.
    """
    require("peft")
    from peft import LoraConfig, inject_adapter_in_model

    layers = check_layers(module, config, targets)
    lora = LoraConfig(
        r=config.rank,
        lora_alpha=config.network_alpha,
        target_modules=sorted(layers),  # type: ignore[arg-type]
        lora_dropout=config.lora_dropout,
        use_rslora=config.use_rslora,
        init_lora_weights=True,
    )
    with seeded(config.seed % 2**63):  # a model is built on the CPU, and so are its first weights
        inject_adapter_in_model(lora, module, adapter_name=ADAPTER_NAME)
    parameters = [parameter for name, parameter in module.named_parameters() if _is_ours(name)]
    for parameter in parameters:
        parameter.data = parameter.data.float()
        parameter.requires_grad_(True)
    return parameters


def file_alpha(config: TrainConfig) -> float:
    """The alpha that makes ``alpha / rank``, which every reader of the file uses, the scale that was trained with."""
    return config.network_alpha * (math.sqrt(config.rank) if config.use_rslora else 1.0)


def adapter_state(module: nn.Module) -> dict[str, torch.Tensor]:
    """The adapter's weights by module path: ``{"<layer>.lora_A.weight": [rank, in], "<layer>.lora_B.weight": ...}``."""
    return {name: parameter.detach().cpu().clone() for name, parameter in _adapter_parameters(module).items()}


def load_adapter_state(module: nn.Module, state: dict[str, torch.Tensor]) -> None:
    """Set the weights that :func:`adapter_state` gave.

    Raises:
        SubjectBoothError: the state is of another adapter.
    """
    parameters = _adapter_parameters(module)
    if set(parameters) != set(state) or any(parameters[name].shape != state[name].shape for name in state):
        raise SubjectBoothError(
            "a checkpoint of another adapter",
            "the adapter this run started with",
            "train anew with force_retrain",
            "checkpoint",
        )
    with torch.no_grad():
        for name, parameter in parameters.items():
            parameter.copy_(state[name])


def without_unused_layers(resume: Checkpoint, modules: Mapping[str, nn.Module]) -> Checkpoint:
    """A checkpoint from when text layers that nothing comes from had a LoRA too, without what it has of those.

    Such a LoRA never had a gradient, hence no optimizer state, but it had a number between the other parameters.

    Args:
        modules: UNet and text encoders with their LoRA in place, in the order of the optimizer's parameters.
    """
    layout: list[bool] = []  # of every parameter of then, whether there still is one
    names: set[str] = set()
    for prefix, module in modules.items():
        own = {f"{prefix}/{name}" for name in _adapter_parameters(module)}
        layers = {name.rsplit(".", 2)[0] for name in own}
        behind = {
            name
            for name in resume.adapter
            if name.startswith(f"{prefix}/")
            and name not in own
            and "encoder.layers." in name
            and _encoder_layer(name) > max(_encoder_layer(layer) for layer in layers)
        }
        names |= behind
        layout += [True] * len(own) + [False] * len(behind)  # those behind the last layer that is used come last
    if not names:
        return resume
    kept = [number for number, still in enumerate(layout) if still]
    number_now = {before: now for now, before in enumerate(kept)}
    return replace(
        resume,
        adapter={name: tensor for name, tensor in resume.adapter.items() if name not in names},
        optimizer={number_now[before]: state for before, state in resume.optimizer.items() if before in number_now},
        average=[resume.average[before] for before in kept] if resume.average else [],
    )


def to_kohya(
    state: dict[str, torch.Tensor],
    prefix: str,
    network_alpha: float,
    layer_names: Mapping[str, str] | None = None,
) -> dict[str, torch.Tensor]:
    """Rename an adapter's weights to what every other LoRA loader reads.

    Args:
        state: from :func:`adapter_state`.
        prefix: ``lora_unet``, or a family's text encoder prefix.
        network_alpha: written as ``.alpha`` for every layer; a missing alpha would mean a scale of 1 to ComfyUI.
        layer_names: what the file calls each layer; None keeps the names they have.

    Returns:
        ``{"<prefix>_<layer>.lora_down.weight": [rank, in], ".lora_up.weight": [out, rank], ".alpha": []}``, float32.
    """
    kohya: dict[str, torch.Tensor] = {}
    for name, tensor in state.items():
        layer, kind, _ = name.rsplit(".", 2)
        layer = layer_names[layer] if layer_names is not None else layer
        key = f"{prefix}_{layer.replace('.', '_')}"
        kohya[f"{key}.{'lora_down' if kind == 'lora_A' else 'lora_up'}.weight"] = tensor.float().contiguous()
        kohya[f"{key}.alpha"] = torch.tensor(float(network_alpha))
    return kohya


def _adapter_parameters(module: nn.Module) -> dict[str, nn.Parameter]:
    """By module path, in the module's order."""
    return {
        name.replace(f".{ADAPTER_NAME}.", "."): parameter
        for name, parameter in module.named_parameters()
        if _is_ours(name)
    }


def _is_ours(name: str) -> bool:
    return f".lora_A.{ADAPTER_NAME}." in name or f".lora_B.{ADAPTER_NAME}." in name
