"""Injects a LoRA (arXiv 2106.09685) and exports it under kohya's keys.

ComfyUI, A1111 and Forge all read kohya's keys. With diffusers' or PEFT's keys, ComfyUI silently loads nothing.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

import torch

from ..config import TrainConfig
from ..errors import SubjectBoothError, require
from ..machine.numerics import seeded
from ..preserve.adapter_layer import AdapterLayer

if TYPE_CHECKING:
    from torch import nn

ADAPTER_NAME = "subject"


def check_layers(layers: Mapping[str, nn.Module], rank: int) -> None:
    """Check the rank against all layers.

    Args:
        layers: the layers that get a LoRA.
        rank: the requested rank.

    Raises:
        SubjectBoothError: the rank exceeds the width of a layer.
    """
    check_rank(rank, min(min(layer.weight.shape[:2]) for layer in layers.values()))  # type: ignore[union-attr,index]


def check_rank(rank: int, narrowest: int) -> None:
    """Check the rank against the narrowest layer.

    Args:
        rank: the requested rank.
        narrowest: width of the narrowest layer that gets a LoRA.

    Raises:
        SubjectBoothError: the rank exceeds it.
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
    layers: Mapping[str, nn.Module],
    dtype: torch.dtype = torch.float32,
) -> list[nn.Parameter]:
    """Add a LoRA to each of the layers, in place, and return its parameters.

    The initial weights depend only on ``config.seed``; the global random state is restored. The LoRA's weights are
    float32 for any dtype of the base, because half precision would round away steps of 1e-4.

    Args:
        module: a frozen network or text encoder.
        config: uses rank, network_alpha, lora_dropout, use_rslora and seed.
        layers: the layers that get a LoRA, by name in the module.
        dtype: the dtype that the module computes in, and so does its LoRA.

    Returns:
        the trainable parameters, float32, in a fixed order.

    Raises:
        SubjectBoothError: the rank exceeds the width of a layer.
    """
    require("peft")
    from peft import LoraConfig, inject_adapter_in_model

    from .lora_forward import speed_up

    check_layers(layers, config.rank)
    lora = LoraConfig(
        r=config.rank,
        lora_alpha=config.network_alpha,  # type: ignore[arg-type]
        target_modules=sorted(layers),
        lora_dropout=config.lora_dropout,
        use_rslora=config.use_rslora,
        init_lora_weights=True,
    )
    with seeded(config.seed % 2**63):  # initial weights are drawn on the CPU, where the model is built
        inject_adapter_in_model(lora, module, adapter_name=ADAPTER_NAME)
    parameters = [parameter for name, parameter in module.named_parameters() if _is_lora(name)]
    for parameter in parameters:
        parameter.data = parameter.data.float()
        parameter.requires_grad_(True)
    speed_up(module, ADAPTER_NAME, dtype)
    return parameters


def layers_of(module: nn.Module) -> Iterator[AdapterLayer]:
    """The LoRA of each layer: its current, differentiable parameters."""
    for layer in lora_layers(module):
        yield AdapterLayer(
            layer.lora_A[ADAPTER_NAME].weight, layer.lora_B[ADAPTER_NAME].weight, float(layer.scaling[ADAPTER_NAME])
        )


@contextmanager
def switched_off(modules: Mapping[str, nn.Module]) -> Iterator[None]:
    """Inside, the modules compute without the LoRA. Not thread-safe."""
    layers = [layer for module in modules.values() for layer in lora_layers(module)]
    try:
        for layer in layers:
            layer._disable_adapters = True  # enable_adapters() would also change requires_grad
        yield
    finally:
        for layer in layers:
            layer._disable_adapters = False


def lora_layers(module: nn.Module) -> list[Any]:
    """The layers with a LoRA, in the order of :func:`layers_of`."""
    return [layer for layer in module.modules() if ADAPTER_NAME in getattr(layer, "lora_A", ())]


def file_alpha(config: TrainConfig) -> float:
    """The alpha for the file: all readers take ``alpha / rank`` as the scale, which must be that of the training."""
    return config.network_alpha * (math.sqrt(config.rank) if config.use_rslora else 1.0)


def adapter_state(module: nn.Module) -> dict[str, torch.Tensor]:
    """The LoRA's weights by module path: ``{"<layer>.lora_A.weight": [rank, in], "<layer>.lora_B.weight": ...}``."""
    return {name: parameter.detach().cpu().clone() for name, parameter in adapter_parameters(module).items()}


def parameter_names(module: nn.Module) -> list[str]:
    """What :func:`adapter_state` calls the trainable parameters, in their order."""
    return list(adapter_parameters(module))


def load_adapter_state(module: nn.Module, state: dict[str, torch.Tensor]) -> None:
    """Restore the weights of :func:`adapter_state`.

    Raises:
        SubjectBoothError: the layers or shapes differ.
    """
    parameters = adapter_parameters(module)
    if set(parameters) != set(state) or any(parameters[name].shape != state[name].shape for name in state):
        raise SubjectBoothError(
            "the checkpoint is of another LoRA",
            "the LoRA that this run started with",
            "train again with force_retrain",
        )
    with torch.no_grad():
        for name, parameter in parameters.items():
            parameter.copy_(state[name])


def to_file(
    state: dict[str, torch.Tensor], file_key: Callable[[str], str], network_alpha: float
) -> dict[str, torch.Tensor]:
    """Rename a LoRA's weights to kohya's keys.

    Args:
        state: from :func:`adapter_state`.
        file_key: from a layer's name to its key in the file.
        network_alpha: written as ``.alpha`` of every layer; if it were missing, ComfyUI would use a scale of 1.

    Returns:
        ``{"<key>.lora_down.weight": [rank, in], ".lora_up.weight": [out, rank], ".alpha": []}``, float32; ``lora_A``
        and ``lora_B`` for keys that do not begin with ``lora_``.
    """
    file: dict[str, torch.Tensor] = {}
    for name, tensor in state.items():
        layer, kind, _ = name.rsplit(".", 2)
        key = file_key(layer)
        if key.startswith("lora_"):  # kohya's names; those of diffusion_model.* keep PEFT's, as other trainers do
            kind = "lora_down" if kind == "lora_A" else "lora_up"
        file[f"{key}.{kind}.weight"] = tensor.float().contiguous()
        file[f"{key}.alpha"] = torch.tensor(float(network_alpha))
    return file


def adapter_parameters(module: nn.Module) -> dict[str, nn.Parameter]:
    """The LoRA's parameters by module path, in module order."""
    return {
        name.replace(f".{ADAPTER_NAME}.", "."): parameter
        for name, parameter in module.named_parameters()
        if _is_lora(name)
    }


def _is_lora(name: str) -> bool:
    return f".lora_A.{ADAPTER_NAME}." in name or f".lora_B.{ADAPTER_NAME}." in name
