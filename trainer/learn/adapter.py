"""LoRA in, kohya file out (LoRA: arXiv 2106.09685).

The file is written with kohya's key names, because ComfyUI, A1111 and Forge all read those; files with diffusers' or
PEFT's names load in ComfyUI as nothing at all.
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
from ..preserve.preservation import AdapterLayer

if TYPE_CHECKING:
    from torch import nn

ADAPTER_NAME = "subject"


def check_layers(layers: Mapping[str, nn.Module], rank: int) -> None:
    """
    Args:
        layers: those that get a LoRA.
        rank: asked for.

    Raises:
        SubjectBoothError: the rank is larger than a layer allows.
    """
    check_rank(rank, min(min(layer.weight.shape[:2]) for layer in layers.values()))  # type: ignore[union-attr,index]


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


def inject(module: nn.Module, config: TrainConfig, layers: Mapping[str, nn.Module]) -> list[nn.Parameter]:
    """Add a LoRA to every one of the layers, in place, and return what trains.

    The first weights depend on ``config.seed`` alone; the global random state is left as it was. The adapter's weights
    are fp32 whatever the base is kept in: in half, steps of 1e-4 are rounded away.

    Args:
        module: a network or text encoder whose weights are frozen.
        config: rank, network_alpha, lora_dropout, use_rslora and seed count.
        layers: of the module by name, those that get a LoRA.

    Returns:
        The trainable parameters, in a fixed order: up and down weights, float32.

    Raises:
        SubjectBoothError: the rank is larger than a layer allows.
    """
    require("peft")
    from peft import LoraConfig, inject_adapter_in_model

    check_layers(layers, config.rank)
    lora = LoraConfig(
        r=config.rank,
        lora_alpha=config.network_alpha,  # type: ignore[arg-type]
        target_modules=sorted(layers),
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


def layers_of(module: nn.Module) -> Iterator[AdapterLayer]:
    """Every layer's low-rank change, as it is now, with its gradient."""
    for layer in _lora_layers(module):
        yield AdapterLayer(
            layer.lora_A[ADAPTER_NAME].weight, layer.lora_B[ADAPTER_NAME].weight, float(layer.scaling[ADAPTER_NAME])
        )


@contextmanager
def switched_off(modules: Mapping[str, nn.Module]) -> Iterator[None]:
    """Inside, the modules are the base without the adapter. Not for several threads at once."""
    layers = [layer for module in modules.values() for layer in _lora_layers(module)]
    try:
        for layer in layers:
            layer._disable_adapters = True  # enable_adapters() would take requires_grad away too
        yield
    finally:
        for layer in layers:
            layer._disable_adapters = False


def _lora_layers(module: nn.Module) -> list[Any]:
    return [layer for layer in module.modules() if ADAPTER_NAME in getattr(layer, "lora_A", ())]


def file_alpha(config: TrainConfig) -> float:
    """The alpha that makes ``alpha / rank``, which every reader of the file uses, the scale that was trained with."""
    return config.network_alpha * (math.sqrt(config.rank) if config.use_rslora else 1.0)


def adapter_state(module: nn.Module) -> dict[str, torch.Tensor]:
    """The adapter's weights by module path: ``{"<layer>.lora_A.weight": [rank, in], "<layer>.lora_B.weight": ...}``."""
    return {name: parameter.detach().cpu().clone() for name, parameter in adapter_parameters(module).items()}


def parameter_names(module: nn.Module) -> list[str]:
    """What :func:`adapter_state` calls the trainable parameters, in their order."""
    return list(adapter_parameters(module))


def load_adapter_state(module: nn.Module, state: dict[str, torch.Tensor]) -> None:
    """Set the weights that :func:`adapter_state` gave.

    Raises:
        SubjectBoothError: the state is of another adapter.
    """
    parameters = adapter_parameters(module)
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


def to_file(
    state: dict[str, torch.Tensor], file_key: Callable[[str], str], network_alpha: float
) -> dict[str, torch.Tensor]:
    """Rename an adapter's weights to what every other LoRA loader reads.

    Args:
        state: from :func:`adapter_state`.
        file_key: what the file calls each layer, by the module's name.
        network_alpha: written as ``.alpha`` for every layer; a missing alpha would mean a scale of 1 to ComfyUI.

    Returns:
        ``{"<key>.lora_down.weight": [rank, in], ".lora_up.weight": [out, rank], ".alpha": []}``, float32.
    """
    file: dict[str, torch.Tensor] = {}
    for name, tensor in state.items():
        layer, kind, _ = name.rsplit(".", 2)
        key = file_key(layer)
        file[f"{key}.{'lora_down' if kind == 'lora_A' else 'lora_up'}.weight"] = tensor.float().contiguous()
        file[f"{key}.alpha"] = torch.tensor(float(network_alpha))
    return file


def adapter_parameters(module: nn.Module) -> dict[str, nn.Parameter]:
    """By module path, in the module's order."""
    return {
        name.replace(f".{ADAPTER_NAME}.", "."): parameter
        for name, parameter in module.named_parameters()
        if _is_ours(name)
    }


def _is_ours(name: str) -> bool:
    return f".lora_A.{ADAPTER_NAME}." in name or f".lora_B.{ADAPTER_NAME}." in name
