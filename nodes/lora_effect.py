"""What ComfyUI makes of a LoRA's layer, asked of ComfyUI itself, so that every kind of adapter it knows is covered.

For a layer that does not fit ComfyUI logs a line and samples without it, whatever the kind: LoRA, LoHa, LoKr, OFT,
BOFT, GLoRA, DoRA, a plain difference, and those that are still to come.
"""

from __future__ import annotations

from typing import Any

import comfy.lora
import torch
from comfy.weight_adapter.lora import LoRAAdapter
from torch.overrides import TorchFunctionMode


def fits(key: Any, patch: Any, shape: torch.Size) -> bool:
    """Whether ComfyUI applies a patch to a weight of this shape.

    Computed without any memory or arithmetic, on the meta device; what fails there is tried on real zeros, because an
    operation may be missing on that device.

    Args:
        key: as ComfyUI's key map has it: the weight's name, or a tuple with the part of it as well.
        patch: from ``comfy.lora.load_lora``.
        shape: the whole weight's.
    """
    if isinstance(patch, LoRAAdapter) and isinstance(key, str):
        up, _, _, mid, _, reshape = patch.weights
        # As many values in another shape would be filled in, in a wrong order.
        if mid is None and reshape is None and up.shape[:1] != shape[:1]:
            return False
    with _EitherBranch():
        applied = _apply(key, patch, torch.empty(shape, device="meta")) is not None
    return applied or _apply(key, patch, torch.zeros(shape)) is not None


def changes_nothing(patches: dict[Any, Any], shapes: dict[str, torch.Size]) -> bool:
    """Whether none of the patches changes any weight: an adapter of zeros, say.

    An adapter that does something is recognised at its first layer: nothing there is all zeros.

    Args:
        patches: all of which fit.
        shapes: of the model's weights, by name.
    """
    for key, patch in patches.items():
        alpha_0 = 0.0 in [value for value in getattr(patch, "weights", ()) if isinstance(value, float)]
        if not alpha_0 and all(factor.float().any() for factor in tensors_of(patch)):  # float8 has no any
            return False
        if isinstance(patch, LoRAAdapter) and patch.weights[4] is None:  # a product, and no DoRA: nothing to compute
            continue
        shape = shapes[key if isinstance(key, str) else key[0]]
        # Next to zeros the smallest difference shows; a rotation (OFT) shows only on something else.
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
    """The patched weight at strength 1, ``weight`` itself where ComfyUI works in place; None where it left it alone."""
    name, offset, function = (*key, None)[:3] if isinstance(key, tuple) else (key, None, None)
    with torch.inference_mode(False), torch.no_grad():  # tensors made in inference mode do not count their changes
        weight = torch.empty_like(weight).copy_(weight)
        before = weight._version
        try:
            patched = comfy.lora.calculate_weight([(1.0, patch, 1.0, offset, function)], weight, name)
        except Exception:  # some kinds fail before ComfyUI's own guard, and would fail the sampler
            return None
    changed: bool = patched is not weight or weight._version > before
    return patched if changed else None


class _EitherBranch(TorchFunctionMode):
    """A condition on a value is true: there are no values on the meta device, and no shape depends on one."""

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        return True if func is torch.Tensor.__bool__ else func(*args, **(kwargs or {}))
