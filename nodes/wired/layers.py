"""A layer of the connected model in training: its own operation, its weights never kept for the backward pass."""

from __future__ import annotations

import contextlib
from functools import partial
from typing import Any

import comfy.ops
import torch
from torch import nn


class _Frozen(torch.autograd.Function):
    """``layer(x)`` of a linear layer or convolution, without keeping its weight: the backward pass asks for it again.

    The weight may be on another device, in a smaller or quantised format, or changed by patches on the fly; ComfyUI
    makes it what it is used as, each time.
    """

    @staticmethod
    def forward(ctx: Any, x: torch.Tensor, layer: nn.Module) -> torch.Tensor:
        """The output of the layer's own operation."""
        ctx.layer, ctx.shape, ctx.dtype = layer, x.shape, x.dtype
        with torch.no_grad():
            return own_forward(layer, x)

    @staticmethod
    def backward(ctx: Any, *gradients: torch.Tensor) -> tuple[torch.Tensor, None]:
        """The gradient with respect to the input."""
        (gradient,) = gradients
        # The meta device, on which memory is counted, has no autocast.
        plain = contextlib.nullcontext() if gradient.is_meta else torch.autocast(gradient.device.type, enabled=False)
        with torch.no_grad(), plain:
            found = _input_gradient(ctx.layer, gradient, ctx.shape)
        return found.to(ctx.dtype), None


def is_linear(layer: nn.Module) -> bool:
    """Whether it is a linear layer: PyTorch's, or ComfyUI's of quantised weights, which is none by class."""
    of_comfy = isinstance(layer, comfy.ops.CastWeightBiasOp) and hasattr(layer, "in_features")
    return isinstance(layer, nn.Linear) or (of_comfy and hasattr(layer, "out_features"))


def own_forward(layer: nn.Module, x: torch.Tensor) -> torch.Tensor:
    """The layer's output by its class, whatever stands in for its ``forward``."""
    return type(layer).forward(layer, x)  # type: ignore[no-any-return]


def frozen(layer: nn.Module, x: torch.Tensor) -> torch.Tensor:
    """The layer's output, which autograd can follow back to ``x`` if it requires a gradient."""
    if torch.is_grad_enabled() and x.requires_grad:
        return _Frozen.apply(x, layer)  # type: ignore[no-any-return]
    with torch.no_grad():
        return own_forward(layer, x)


def _input_gradient(layer: nn.Module, gradient: torch.Tensor, shape: torch.Size) -> torch.Tensor:
    weight, release = _weight_in_use(layer, gradient)
    try:
        if weight is None:
            return _by_autograd(layer, gradient, shape)
        gradient = gradient.to(weight.dtype)
        if is_linear(layer):
            gradient = gradient @ weight
            smoothing = getattr(layer, "pre_quant_scale", None)  # a factor of the input, of some quantised formats
            return gradient if smoothing is None else gradient * smoothing.to(gradient)
        return _conv_input_gradient(layer, gradient, weight, shape)
    finally:
        release()


def _weight_in_use(layer: nn.Module, like: torch.Tensor) -> tuple[torch.Tensor | None, Any]:
    """The weight as ComfyUI uses it, and what to call afterwards; None if only the layer itself knows."""
    if not isinstance(layer, comfy.ops.CastWeightBiasOp) or _has_own_cast(layer):
        return None, lambda: None
    weight, bias, stream = comfy.ops.cast_bias_weight(layer, like, offloadable=True)
    if isinstance(weight, comfy.ops.QuantizedTensor):
        weight = weight.dequantize()
    return weight, lambda: comfy.ops.uncast_bias_weight(layer, weight, bias, stream)


def _has_own_cast(layer: nn.Module) -> bool:
    """Whether another pack's layer (GGUF) makes its weight itself."""
    return type(layer).__module__.split(".")[0] != "comfy"


def _by_autograd(layer: nn.Module, gradient: torch.Tensor, shape: torch.Size) -> torch.Tensor:
    """By autograd through the layer's own operation, which is linear, so that the input's values do not matter."""
    with torch.enable_grad():
        x = torch.zeros(shape, dtype=gradient.dtype, device=gradient.device, requires_grad=True)
        return torch.autograd.grad(own_forward(layer, x), x, gradient)[0]


def _conv_input_gradient(
    layer: nn.Module, gradient: torch.Tensor, weight: torch.Tensor, shape: torch.Size
) -> torch.Tensor:
    count = len(shape) - 2
    return torch.ops.aten.convolution_backward(  # type: ignore[no-any-return]
        gradient,
        gradient.new_empty(1).expand(shape),
        weight,
        None,
        layer.stride,
        layer.padding,
        layer.dilation,
        False,
        [0] * count,
        layer.groups,
        [True, False, False],
    )[0]


def stand_in_for(layer: nn.Module) -> nn.Module:
    """What PEFT sees of a layer: its kind, shape and output. The weight stays the connected model's.

    ``weight`` has the right shape and takes no memory; it is no parameter, so that nothing moves, saves or counts it.
    An instance of the plain class, as PEFT makes layers of the same class; ``wired`` is the layer itself.
    """
    kind, names = (nn.Linear, _LINEAR) if is_linear(layer) else (nn.Conv2d, _CONVOLUTION)
    found: Any = kind.__new__(kind)
    nn.Module.__init__(found)
    for name in names:
        setattr(found, name, getattr(layer, name))
    found.register_parameter("bias", None)
    # Not the weight's own shape: another pack may keep it packed.
    shape: Any = (found.out_features, found.in_features) if kind is nn.Linear else layer.weight.shape
    object.__setattr__(found, "weight", torch.empty(1).expand(shape))  # not registered
    use_layer(found, layer)
    return found  # type: ignore[no-any-return]


def use_layer(stand_in: nn.Module, layer: nn.Module) -> None:
    """Let a stand-in call this layer."""
    for name, value in {"wired": layer, "forward": partial(frozen, layer)}.items():
        object.__setattr__(stand_in, name, value)


_LINEAR = ("in_features", "out_features")
_CONVOLUTION = (
    "in_channels", "out_channels", "kernel_size", "stride", "padding", "dilation", "groups", "padding_mode",
)  # fmt: skip
