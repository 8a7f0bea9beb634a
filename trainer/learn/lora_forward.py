"""The forward pass of layers with a LoRA: PEFT's result, with fewer kernels.

In float32 the bits are PEFT's. In half precision the LoRA's float32 weights are copied to half once for all layers
whenever the module is called, and their gradients back once; PEFT's layers cast each weight and each input by itself,
which was a quarter of a step's kernels.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import torch
from peft.tuners.lora.layer import Conv2d, Linear
from torch.nn.functional import linear

if TYPE_CHECKING:
    from torch import nn


def speed_up(module: nn.Module, name: str, dtype: torch.dtype) -> None:
    """Replace the forward pass of the module's LoRA layers.

    Args:
        module: with LoRA layers of PEFT, whose weights are float32.
        name: PEFT's name of the LoRA.
        dtype: the dtype that the LoRA computes in, which is the base's.
    """
    layers: list[Any] = []
    layer: Any
    for layer in module.modules():
        if type(layer) in _KINDS and name in layer.lora_A:
            layer.__class__ = _KINDS[type(layer)]
            layer.lora_name, layer.lora_dtype, layer.copies = name, dtype, None
            layers.append(layer)
    if dtype != torch.float32 and layers:
        copying = _Copying(layers, dtype)
        module.register_forward_pre_hook(copying.before)
        module.register_forward_hook(copying.after, always_call=True)


class _Copies:
    """The weights of one layer in half precision.

    Attributes:
        is_recorded: whether autograd can follow them back to the layer's own weights.
    """

    def __init__(self, down: torch.Tensor, up: torch.Tensor, is_recorded: bool) -> None:
        self.down, self.up, self.is_recorded = down, up, is_recorded

    def __deepcopy__(self, memo: Any) -> None:
        """None: a copied layer makes its own, and tensors that autograd follows cannot be copied."""


class _Copying:
    """Gives the layers of a module their half-precision weights while it runs.

    With gradients they stay until the next call, because checkpointing runs blocks again in the backward pass. Layers
    that are called in another way cast their weights themselves.
    """

    def __init__(self, layers: Sequence[Any], dtype: torch.dtype) -> None:
        self._layers, self._dtype = tuple(layers), dtype

    def before(self, module: Any, inputs: Any) -> None:
        """Make the copies."""
        layers = self._layers
        if layers[0].disable_adapters:
            return
        weights = [weight for layer in layers for weight in layer.own_weights()]
        is_recorded = torch.is_grad_enabled()
        made = _InHalf.apply(self._dtype, *weights) if is_recorded else in_half(weights, self._dtype)
        for number, layer in enumerate(layers):
            layer.copies = _Copies(made[2 * number], made[2 * number + 1], is_recorded)

    def after(self, module: Any, inputs: Any, output: Any) -> None:
        """Drop copies that nothing will use again."""
        if not torch.is_grad_enabled():
            for layer in self._layers:
                layer.copies = None


class _InHalf(torch.autograd.Function):
    """Copies in another dtype: one kernel for all of them, and one for all gradients."""

    @staticmethod
    def forward(ctx: Any, dtype: torch.dtype, *weights: torch.Tensor) -> tuple[torch.Tensor, ...]:
        """The copies."""
        ctx.set_materialize_grads(False)
        ctx.dtype = weights[0].dtype
        return tuple(in_half(weights, dtype))

    @staticmethod
    def backward(ctx: Any, *gradients: torch.Tensor | None) -> tuple[torch.Tensor | None, ...]:
        """The gradients, in the weights' own dtype."""
        there = iter(in_half([gradient for gradient in gradients if gradient is not None], ctx.dtype))
        return (None, *(None if gradient is None else next(there) for gradient in gradients))


def in_half(tensors: Sequence[torch.Tensor], dtype: torch.dtype) -> list[torch.Tensor]:
    """Copies of all tensors in ``dtype``, by one kernel or a few."""
    copies = [torch.empty_like(tensor, dtype=dtype) for tensor in tensors]
    with torch.no_grad():
        if copies:
            torch._foreach_copy_(copies, list(tensors))
    return copies


class _OwnForward:
    """What both kinds of layers have in common.

    Attributes:
        lora_name: PEFT's name of the LoRA.
        lora_dtype: the dtype that it computes in.
        copies: its weights in that dtype, while there are any.
    """

    lora_name: str
    lora_dtype: torch.dtype
    copies: _Copies | None

    def own_weights(self: Any) -> tuple[torch.Tensor, torch.Tensor]:
        """The float32 weights, down and up."""
        return self.lora_A[self.lora_name].weight, self.lora_B[self.lora_name].weight

    def forward(self: Any, x: torch.Tensor, *arguments: Any, **keywords: Any) -> torch.Tensor:
        """``base(x) + scale * up(down(dropout(x)))``, in the dtype of ``base(x)``."""
        result: torch.Tensor = self.base_layer(x, *arguments, **keywords)
        if self.disable_adapters:
            return result
        copies = self.copies
        if copies is not None and copies.is_recorded == torch.is_grad_enabled():
            down, up = copies.down, copies.up
        else:
            down, up = (weight.to(self.lora_dtype) for weight in self.own_weights())
        x = self.lora_dropout[self.lora_name](x.to(self.lora_dtype))
        return self.sum(result, x, down, up, self.scaling[self.lora_name]).to(result.dtype)  # type: ignore[no-any-return]


class _Linear(_OwnForward, Linear):
    def sum(
        self, result: torch.Tensor, x: torch.Tensor, down: torch.Tensor, up: torch.Tensor, scale: float
    ) -> torch.Tensor:
        low = linear(x, down)
        if result.dtype == low.dtype != torch.float32:
            rows = torch.addmm(result.flatten(0, -2), low.flatten(0, -2), up.t(), alpha=scale)
            return rows.view(result.shape)
        return _plus(result, linear(low, up), scale)


class _Conv2d(_OwnForward, Conv2d):
    def sum(
        self, result: torch.Tensor, x: torch.Tensor, down: torch.Tensor, up: torch.Tensor, scale: float
    ) -> torch.Tensor:
        first, second = self.lora_A[self.lora_name], self.lora_B[self.lora_name]
        return _plus(result, second._conv_forward(first._conv_forward(x, down, None), up, None), scale)


def _plus(result: torch.Tensor, change: torch.Tensor, scale: float) -> torch.Tensor:
    return result + (change if scale == 1.0 else change * scale)  # a product with 1 would change no bit


_KINDS: dict[type, type] = {Linear: _Linear, Conv2d: _Conv2d}
