"""The weights behind a wired MODEL, CLIP or VAE: as they would be sampled with, and what identifies them.

Clones of a MODEL share one module, and once a patched clone was loaded that module's own state dict holds patched
weights. So each weight is taken from ``get_key_patches()``, which knows the original, and its patches are applied to a
copy, with the rounding that ComfyUI itself uses.
"""

from __future__ import annotations

import weakref
from typing import Any

import comfy.float
import comfy.lora
import comfy.model_management
import torch
from comfy.model_patcher import ModelPatcher, string_to_seed

from ..trainer.storage import sha256_of
from ..trainer.unsupported import refuse_quantised

# ComfyUI makes these for every CLIP, but no SD 1.x checkpoint holds them (nor SDXL's first encoder): they are whatever
# was in memory, differ from load to load, and no UNet that is trained here sees what comes out of them. SDXL's second
# encoder has its own, which counts.
_LEFT_OVER = tuple(f"clip_{encoder}.{name}" for encoder in "lh" for name in (
    "transformer.text_projection.weight", "logit_scale"))

# Hashing gigabytes takes seconds, so it is done once for each loaded module, and once more for each set of patches.
_original_digests: weakref.WeakKeyDictionary[torch.nn.Module, str] = weakref.WeakKeyDictionary()
_patched_digests: weakref.WeakKeyDictionary[torch.nn.Module, dict[Any, str]] = weakref.WeakKeyDictionary()


def shapes_of(patcher: ModelPatcher, prefix: str = "") -> dict[str, torch.Size]:
    """Name (without ``prefix``) and shape of every weight below ``prefix``."""
    return {key[len(prefix):]: tensor.shape for key, tensor in patcher.model_state_dict(prefix).items()}


def stored_as(patcher: ModelPatcher, prefix: str = "") -> dict[str, str]:
    """Name (without ``prefix``) and kind of number of every weight below ``prefix``."""
    return {key[len(prefix):]: _kind(tensor) for key, tensor in patcher.model_state_dict(prefix).items()}


def effective_weights(patcher: ModelPatcher, prefix: str = "") -> dict[str, torch.Tensor]:
    """Every weight below ``prefix`` with the wired patches applied, in the model's own dtype.

    Unpatched weights are the module's own tensors: read them, never write to them.

    Raises:
        SubjectBoothError: a weight is stored in a format that cannot be trained on (fp8, GGUF).
    """
    with torch.inference_mode():
        return {key[len(prefix):]: _patched(key, entries)
                for key, entries in patcher.get_key_patches(prefix or None).items()}


def digest_of(patcher: ModelPatcher, prefix: str = "") -> str:
    """SHA-256 over the weights below ``prefix``, patches included; remembered for as long as the module lives."""
    with torch.inference_mode():
        module = patcher.model
        weights = [(key, entries) for key, entries in patcher.get_key_patches(prefix or None).items()
                   if key not in _LEFT_OVER]
        if module not in _original_digests:
            lines = (f"{key} {sha256_of(entries[0][0])}" for key, entries in weights)
            _original_digests[module] = sha256_of("\n".join(sorted(lines)))
        if not patcher.patches:
            return _original_digests[module]
        known = _patched_digests.setdefault(module, {})
        if patcher.patches_uuid not in known:
            lines = (f"{key} {sha256_of(_patched(key, entries))}" for key, entries in weights if len(entries) > 1)
            known[patcher.patches_uuid] = sha256_of(_original_digests[module], "\n".join(sorted(lines)))
        return known[patcher.patches_uuid]


def _kind(weight: torch.Tensor) -> str:
    # ComfyUI-GGUF's weights are packed bytes; its state dict has stand-ins of them.
    if getattr(weight, "tensor_type", None) is not None or weight.dtype in (torch.uint8, torch.int8):
        return "packed bytes, as GGUF and nf4 are"
    return str(weight.dtype).removeprefix("torch.")


def _patched(key: str, entries: list[Any]) -> torch.Tensor:
    weight, convert = entries[0]
    refuse_quantised({key: _kind(weight)}, key)
    if len(entries) == 1:
        return weight
    full = comfy.model_management.cast_to_device(weight, torch.device("cpu"), torch.float32, copy=True)
    full = comfy.lora.calculate_weight(entries[1:], convert(full, inplace=True), key)
    return comfy.float.stochastic_rounding(full, weight.dtype, seed=string_to_seed(key))
