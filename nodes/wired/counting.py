"""Prepares the connected model for counting its memory on the meta device; see :mod:`trainer.memory.whole_step`."""

from __future__ import annotations

import copy
from collections.abc import Iterator
from contextlib import contextmanager
from types import SimpleNamespace
from typing import Any

import comfy.ops
import torch
from torch import nn
from torch.nn import functional

from ...trainer.base.sd.counting import MemoryEfficientAttention
from .layers import use_layer
from .network import WiredNetwork

META = torch.device("meta")


@contextmanager
def countable(network: WiredNetwork, is_checkpointed: bool) -> Iterator[nn.Module]:
    """The network with the layers of an empty copy of the connected model in place of its own; it allocates as much as
    on a real device with memory-efficient attention. Restored on exit.

    Args:
        is_checkpointed: whether it recomputes its blocks.
    """
    patcher, sampling = network.patcher, network.giving_output
    on_meta = _on_meta(sampling())
    before = network.is_checkpointed, network.is_checked
    # What the trainer has asked for takes effect only when the model is loaded.
    empty = _empty_copy(patcher.model, patcher.get_model_object("manual_cast_dtype") or patcher.model.get_dtype())
    network.take_off()
    try:
        network.patcher, network.giving_output = SimpleNamespace(model=empty), lambda: on_meta
        network.is_checkpointed, network.is_checked = is_checkpointed, True
        _repoint(network)
        with _counted_attention():
            network.put_on()
            yield _Counted(network, empty.diffusion_model)
    finally:
        network.take_off()
        network.patcher, network.giving_output = patcher, sampling
        network.is_checkpointed, network.is_checked = before
        _repoint(network)


def _empty_copy(model: Any, dtype: torch.dtype) -> Any:
    """ComfyUI's model with the same layers on the meta device, in the dtype that it will compute in."""
    settings = {**model.model_config.unet_config, "dtype": dtype}
    empty = type(model.diffusion_model)(**settings, device=META, operations=comfy.ops.disable_weight_init)
    found = copy.copy(model)
    found._modules = {**model._modules, "diffusion_model": empty.to(META).eval()}
    found.manual_cast_dtype = None
    return found


def _on_meta(sampling: Any) -> Any:
    """A sampling object with its tables on the meta device, where the times are."""
    found = copy.copy(sampling)
    found._buffers = {name: table.to(META) for name, table in sampling._buffers.items() if table is not None}
    return found


def _repoint(network: WiredNetwork) -> None:
    """Let the stand-ins call the layers of the model that the network now has."""
    layers = dict(network.diffusion_model.named_modules())
    for name, stand_in in network.layers().items():
        use_layer(getattr(stand_in, "base_layer", stand_in), layers[network.path_of(name)])


class _Counted(nn.Module):
    """The network together with the layers of the empty copy, whose weights count as the base's."""

    def __init__(self, network: WiredNetwork, base: nn.Module) -> None:
        super().__init__()
        self.network, self.base = network, base

    def forward(self, *arguments: Any) -> torch.Tensor:
        return self.network.forward(*arguments)


@contextmanager
def _counted_attention() -> Iterator[None]:
    """Inside, attention on the meta device keeps what memory-efficient kernels keep; torch's keeps the scores there.

    By name in torch's module, as blocks that are computed again see no mode of the forward pass.
    """
    kernel = functional.scaled_dot_product_attention

    def counted(query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, *args: Any, **keywords: Any) -> Any:
        if query.is_meta:
            return MemoryEfficientAttention.apply(query, key, value)
        return kernel(query, key, value, *args, **keywords)

    functional.scaled_dot_product_attention = counted
    try:
        yield
    finally:
        functional.scaled_dot_product_attention = kernel
