"""What ComfyUI does with a LoRA's layers, determined with ComfyUI's own code, so that every adapter type is covered.

If a layer does not fit, ComfyUI only logs a line and samples without it, whatever the type: LoRA, LoHa, LoKr, OFT,
BOFT, GLoRA, DoRA, a plain difference, and any future ones.
"""

from __future__ import annotations

from typing import Any

import comfy.lora
import torch
from comfy.weight_adapter.lora import LoRAAdapter
from torch.overrides import TorchFunctionMode


def fits(key: Any, patch: Any, shape: torch.Size) -> bool:
    """Whether ComfyUI applies a patch to a weight of this shape.

    Computed on the meta device, without memory or arithmetic. What fails there is retried on real zeros, because the
    meta device lacks some operations.

    Args:
        key: from ComfyUI's key map: the weight's name, or a tuple that also selects a part of it.
        patch: from ``comfy.lora.load_lora``.
        shape: shape of the whole weight.
    """
    if isinstance(patch, LoRAAdapter) and isinstance(key, str):
        up, _, _, mid, _, reshape = patch.weights
        # ComfyUI would reshape the same number of values, in the wrong order.
        if mid is None and reshape is None and up.shape[:1] != shape[:1]:
            return False
    with _EitherBranch():
        applied = _apply(key, patch, torch.empty(shape, device="meta")) is not None
    return applied or _apply(key, patch, torch.zeros(shape)) is not None


def has_no_effect(patches: dict[Any, Any], shapes: dict[str, torch.Size]) -> bool:
    """Whether none of the patches changes any weight, as with an adapter of zeros.

    An effective adapter is recognised by its first layer, where no tensor is all zeros.

    Args:
        patches: all of them fit.
        shapes: shapes of the model's weights, by name.
    """
    for key, patch in patches.items():
        alpha_0 = 0.0 in [value for value in getattr(patch, "weights", ()) if isinstance(value, float)]
        if not alpha_0 and all(factor.float().any() for factor in tensors_of(patch)):  # float8 has no any
            return False
        if (
            isinstance(patch, LoRAAdapter) and patch.weights[4] is None
        ):  # a plain product (no DoRA): zero without computing it
            continue
        shape = shapes[key if isinstance(key, str) else key[0]]
        # On zeros the smallest difference shows; a rotation (OFT) only shows on other values.
        for weight in (torch.zeros(shape), torch.linspace(-1, 1, shape.numel()).reshape(shape)):
            applied = _apply(key, patch, weight)
            if applied is None or applied.shape != shape or not torch.equal(applied, weight):
                return False
    return True


def tensors_of(patch: Any) -> list[torch.Tensor]:
    """The tensors of an adapter, or of a plain difference."""
    values = patch.weights if hasattr(patch, "weights") else patch[-1]
    return [value for value in values if isinstance(value, torch.Tensor)]


def _apply(key: Any, patch: Any, weight: torch.Tensor) -> torch.Tensor | None:
    """The patched weight at strength 1 (``weight`` itself if ComfyUI works in place); None if it did nothing."""
    name, offset, function = (*key, None)[:3] if isinstance(key, tuple) else (key, None, None)
    with torch.inference_mode(False), torch.no_grad():  # tensors created in inference mode have no version counter
        weight = torch.empty_like(weight).copy_(weight)
        before = weight._version
        try:
            patched = comfy.lora.calculate_weight([(1.0, patch, 1.0, offset, function)], weight, name)
        except Exception:  # some types fail outside of ComfyUI's own guard, and would fail in the sampler too
            return None
    changed: bool = patched is not weight or weight._version > before
    return patched if changed else None


class _EitherBranch(TorchFunctionMode):
    """Treat conditions on values as true: the meta device has no values, and no shape depends on one."""

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        return True if func is torch.Tensor.__bool__ else func(*args, **(kwargs or {}))
