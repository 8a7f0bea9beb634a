"""The effective weights of a connected MODEL, CLIP or VAE, and their digests.

Clones of a MODEL share one module, and once a patched clone has been loaded, the module's own state dict holds patched
weights. So each weight is read from ``get_key_patches()``, which has the original, and its patches are applied to a
copy, with ComfyUI's own rounding.

With dynamic VRAM (ComfyUI 0.16 and newer, the default on NVIDIA) a module keeps its weights in the dtype of the file,
and ComfyUI casts each to its compute dtype when it is used. Weights are always read here in the dtype they are used in,
so that digests and trained weights are the same in both modes.

A LoRA is merged in float32 and rounded once. ComfyUI 0.33 merges it in float16 on a capable GPU, which moves the
weights by about 0.1 % of what the LoRA changes (docs/compatibility.md). Following it would give the same base a
different digest on each kind of device, and users of older versions would have to train again.
"""

from __future__ import annotations

import os
import weakref
from collections.abc import Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import comfy.float
import comfy.lora
import comfy.model_management
import torch
from comfy.model_patcher import ModelPatcher

from ..trainer.base.sd.unsupported import refuse_quantised
from ..trainer.errors import SubjectBoothError
from ..trainer.files.digest_memory import DigestMemory
from ..trainer.files.storage import sha256_of
from .host import user_folder

try:
    from comfy.utils import string_to_seed
except ImportError:  # 0.3.75; later, the one in model_patcher logs a warning at each call
    from comfy.model_patcher import string_to_seed

try:
    import comfy.memory_management as memory_management
except ImportError:  # 0.3.75 has no dynamic VRAM
    memory_management = None

# ComfyUI creates these for every CLIP, but SD 1.x checkpoints do not contain them (nor does SDXL's first encoder): they
# are uninitialised memory, differ from load to load, and do not affect any UNet that can be trained here. SDXL's second
# encoder has real ones, which count.
_LEFT_OVER = tuple(
    f"clip_{encoder}.{name}" for encoder in "lh" for name in ("transformer.text_projection.weight", "logit_scale")
)

SAMPLES, SAMPLE_BYTES = 64, 64
"""Parts of a weight by which a remembered digest is found."""

_TABLES = ("embedding", "embed_tokens", "shared.weight")
"""Parts of the names of tables with a row for each token."""

HASHING_THREADS = min(8, os.cpu_count() or 1)

# Hashing gigabytes takes seconds, so digests are cached by loaded module and by set of patches.
_original_digests: weakref.WeakKeyDictionary[torch.nn.Module, str] = weakref.WeakKeyDictionary()
_patched_digests: weakref.WeakKeyDictionary[torch.nn.Module, dict[Any, str]] = weakref.WeakKeyDictionary()


def dynamic_vram() -> bool:
    """Whether this ComfyUI keeps weights in the dtype of the file and casts them on use."""
    return bool(getattr(memory_management, "aimdo_enabled", False))


def shapes_of(patcher: ModelPatcher, prefix: str = "") -> dict[str, torch.Size]:
    """Name (without ``prefix``) and shape of every weight below ``prefix``."""
    return {key[len(prefix) :]: tensor.shape for key, tensor in patcher.model_state_dict(prefix).items()}


def stored_as(patcher: ModelPatcher, prefix: str = "") -> dict[str, str]:
    """Name (without ``prefix``) and dtype in use of every weight below ``prefix``."""
    return {
        key[len(prefix) :]: _kind(tensor, _dtype_in_use(patcher, key, tensor))
        for key, tensor in patcher.model_state_dict(prefix).items()
    }


def refuse_comfy_quant(patcher: ModelPatcher, where: str) -> None:
    """
    Raises:
        SubjectBoothError: the model is quantised in ComfyUI's own format, which stores tables next to the weights.
    """
    if any(name.endswith(".comfy_quant") for name in patcher.model_state_dict()):
        raise SubjectBoothError(
            f"the {where} is quantised (in ComfyUI's comfy_quant format)",
            "weights in fp32, fp16 or bf16",
            "load the unquantised file",
            where,
        )


def effective_weights(patcher: ModelPatcher, prefix: str = "") -> Mapping[str, torch.Tensor]:
    """Every weight below ``prefix`` with its patches applied, in the dtype it is used in.

    Each is computed on access, so that there is never a second copy of the model. Unpatched weights may be the
    module's own tensors: do not write to them.

    Raises:
        SubjectBoothError: a weight is used in a format that cannot be trained on (fp8, GGUF).
    """
    with torch.inference_mode():
        return _Effective(patcher, prefix)


def digest_of(patcher: ModelPatcher, prefix: str = "") -> str:
    """SHA-256 over the weights below ``prefix``, patches included.

    It is computed once per loaded module. That of the unpatched weights is also remembered on disk, by a sample of each
    weight, because hashing gigabytes takes seconds and, with dynamic VRAM, reads the whole file.
    """
    with torch.inference_mode():
        module = patcher.model
        if module in _original_digests and not patcher.patches:
            return _original_digests[module]
        weights = [(key, entries) for key, entries in _key_patches(patcher, prefix).items() if key not in _LEFT_OVER]
        if module not in _original_digests:
            _original_digests[module] = _original_digest(patcher, weights)
        if not patcher.patches:
            return _original_digests[module]
        known = _patched_digests.setdefault(module, {})
        if patcher.patches_uuid not in known:
            lines = (
                f"{key} {sha256_of(_patched(patcher, key, entries))}" for key, entries in weights if len(entries) > 1
            )
            known[patcher.patches_uuid] = sha256_of(_original_digests[module], "\n".join(sorted(lines)))
        return known[patcher.patches_uuid]


_Weights = Sequence[tuple[str, list[Any]]]
"""Name of each weight, and ComfyUI's entry for it: the original, followed by its patches."""


def _original_digest(patcher: ModelPatcher, weights: _Weights) -> str:
    memory = DigestMemory(user_folder() / "digests")
    key = _sample_key(patcher, weights)
    found = memory.find(key) if key else None
    if found is None:

        def line(weight: tuple[str, list[Any]]) -> str:
            with torch.inference_mode():  # it is on or off for each thread
                name, entries = weight
                return f"{name} {sha256_of(_original(patcher, name, entries))}"

        with ThreadPoolExecutor(HASHING_THREADS) as pool:
            found = sha256_of("\n".join(sorted(pool.map(line, weights))))
        if key:
            memory.keep(key, found)
    return found


def _sample_key(patcher: ModelPatcher, weights: _Weights) -> str | None:
    """What tells weights from others: names, dtypes, shapes and a sample of each. None for weights in other formats.

    Fine-tuning, merging or rounding a model changes nearly every number of a weight. Only a table of embeddings may
    have a single row changed, so those are hashed whole.
    """
    lines = []
    for name, entries in weights:
        weight = entries[0][0]
        if type(weight) not in (torch.Tensor, torch.nn.Parameter) or weight.is_meta:
            return None
        found = sha256_of(weight if any(part in name for part in _TABLES) else _sample(weight))
        lines.append(f"{name} {_dtype_in_use(patcher, name, weight)} {weight.dtype} {tuple(weight.shape)} {found}")
    return sha256_of("weights 1", "\n".join(sorted(lines)))


def _sample(weight: torch.Tensor) -> torch.Tensor:
    """Evenly spaced parts of a weight, the first and the last included; all of a small one."""
    data = weight.detach().reshape(-1).view(torch.uint8)
    if data.numel() <= 4 * SAMPLES * SAMPLE_BYTES:
        return data
    spread = torch.linspace(0, data.numel() - SAMPLE_BYTES, SAMPLES, dtype=torch.float64).long()
    return data[(spread[:, None] + torch.arange(SAMPLE_BYTES)).to(data.device)]


def _key_patches(patcher: ModelPatcher, prefix: str) -> dict[str, list[Any]]:
    """ComfyUI's ``get_key_patches``; or weights as stored, where it cannot read a quantised format."""
    try:
        return patcher.get_key_patches(prefix or None)  # type: ignore[no-any-return]
    except AttributeError:
        pass
    found = {}
    for key, stored in patcher.model_state_dict(prefix).items():
        weight = _attribute(patcher.model, key) if stored.is_meta else stored  # ComfyUI-GGUF shows stand-ins
        if weight is not None:
            found[key] = [(weight, lambda a, **_: a), *patcher.patches.get(key, [])]
    return found


def _attribute(module: torch.nn.Module, key: str) -> torch.Tensor | None:
    """The tensor of this name; None if there is none."""
    path, _, name = key.rpartition(".")
    try:
        found = getattr(module.get_submodule(path), name)
    except AttributeError:
        return None
    return found.as_subclass(torch.Tensor) if isinstance(found, torch.Tensor) else None


class _Effective(Mapping[str, torch.Tensor]):
    """See :func:`effective_weights`."""

    def __init__(self, patcher: ModelPatcher, prefix: str) -> None:
        self._patcher, self._prefix = patcher, prefix
        self._entries = patcher.get_key_patches(prefix or None)
        for key, entries in self._entries.items():
            refuse_quantised({key: _kind(entries[0][0], _dtype_in_use(patcher, key, entries[0][0]))}, key)

    def __getitem__(self, name: str) -> torch.Tensor:
        key = self._prefix + name
        with torch.inference_mode():
            return _patched(self._patcher, key, self._entries[key])

    def __iter__(self) -> Iterator[str]:
        return (key[len(self._prefix) :] for key in self._entries)

    def __len__(self) -> int:
        return len(self._entries)


def _kind(weight: torch.Tensor, dtype: torch.dtype) -> str:
    # ComfyUI-GGUF packs weights into bytes; its state dict only has placeholders.
    if getattr(weight, "tensor_type", None) is not None or weight.dtype in (torch.uint8, torch.int8):
        return "packed bytes, as GGUF and nf4 are"
    return str(dtype).removeprefix("torch.")


def _dtype_in_use(patcher: ModelPatcher, key: str, weight: torch.Tensor) -> torch.dtype:
    """The dtype ComfyUI casts a weight to before use; with dynamic VRAM, the one recorded on the weight's module."""
    if not dynamic_vram():
        return weight.dtype
    path, _, name = key.rpartition(".")
    try:
        module = patcher.model.get_submodule(path)
    except AttributeError:  # a table next to a quantised weight is not a parameter of a module
        return weight.dtype
    return getattr(module, f"{name}_comfy_model_dtype", None) or weight.dtype


def _original(patcher: ModelPatcher, key: str, entries: list[Any]) -> torch.Tensor:
    weight = entries[0][0]
    dtype = _dtype_in_use(patcher, key, weight)
    return weight if dtype == weight.dtype else weight.to(dtype)


def _patched(patcher: ModelPatcher, key: str, entries: list[Any]) -> torch.Tensor:
    weight = _original(patcher, key, entries)
    refuse_quantised({key: _kind(entries[0][0], weight.dtype)}, key)
    if len(entries) == 1:
        return weight
    full = comfy.model_management.cast_to_device(weight, torch.device("cpu"), torch.float32, copy=True)
    patches = _patches_as_used(entries[1:], weight.dtype) if dynamic_vram() else entries[1:]
    full = comfy.lora.calculate_weight(patches, entries[0][1](full, inplace=True), key)
    return comfy.float.stochastic_rounding(full, weight.dtype, seed=string_to_seed(key))


def _patches_as_used(patches: list[Any], dtype: torch.dtype) -> list[Any]:
    """The same patches, with weights of a merged model cast to the same dtype."""
    used = []
    for strength, value, *rest in patches:
        if isinstance(value, list):  # ((weight, convert), patches of that model ...)
            (weight, convert), *others = value
            value = [(weight.to(dtype), convert), *_patches_as_used(others, dtype)]
        used.append((strength, value, *rest))
    return used
