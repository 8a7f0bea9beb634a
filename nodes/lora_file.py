"""The SUBJECT_LORA type, and the check that ComfyUI applies every key of a LoRA."""

from __future__ import annotations

import re
from dataclasses import dataclass
from functools import cached_property, lru_cache
from pathlib import Path
from typing import Any

import comfy.lora
import comfy.lora_convert
import torch
from comfy.model_patcher import ModelPatcher
from comfy.sd import CLIP

from ..trainer.errors import SubjectBoothError
from ..trainer.files.storage import sha256_of
from ..trainer.runs.lora_reader import peft_config_path, read_lora, trigger_words
from .lora_effect import fits, tensors_of

EMBEDDING = "bundle_emb."
"""Prefix of textual-inversion embeddings that A1111 bundles with a LoRA; ComfyUI does not read them."""

_ENDING = re.compile(
    r"([._]lora[._].*|\.(hada|lokr|oft|boft)_\w+|\.[ab][12]\.weight"
    r"|\.(alpha|dora_scale|diff|diff_b|set_weight|w_norm|b_norm|rescale|reshape_weight))$"
)
"""Suffix of a tensor's name after its layer's name, in the spellings that ComfyUI reads."""


@dataclass(frozen=True)
class SubjectLora:
    """The value of SUBJECT_LORA.

    Attributes:
        path: the published file.
        tensors: its tensors, with kohya's key names.
        metadata: its metadata, which include the trigger words.
    """

    path: Path
    tensors: dict[str, torch.Tensor]
    metadata: dict[str, str]

    @cached_property
    def digest(self) -> str:
        """SHA-256 of the tensors and their names."""
        return sha256_of(*(part for name in sorted(self.tensors) for part in (name, self.tensors[name])))

    @property
    def trigger(self) -> str:
        """The trigger words ("ohwx dog"); empty if a third-party file does not contain them."""
        return trigger_words(self.metadata)


def load_lora_file(path: Path) -> SubjectLora:
    """Read a LoRA file, ours or third-party; the last one is kept, as a node runs again when only its prompt changes.

    Raises:
        SubjectBoothError: the file is damaged or not a LoRA.
    """
    try:
        return _read(path, state_of(path))
    except OSError:
        return _read.__wrapped__(path, ())  # which says what is wrong with it


@lru_cache(maxsize=1)
def _read(path: Path, state: tuple[object, ...]) -> SubjectLora:
    return SubjectLora(path, *read_lora(path))


def state_of(path: Path) -> tuple[object, ...]:
    """What is different if a LoRA file, or the settings of PEFT next to it, were written again.

    Raises:
        OSError: there is no such file.
    """
    files = [path, *filter(None, [peft_config_path(path)])]
    return tuple((file.stat().st_ino, file.stat().st_size, file.stat().st_mtime_ns) for file in files)


def layers_of(tensors: dict[str, torch.Tensor]) -> list[str]:
    """The layers that a file contains, in any program's naming; bundled embeddings do not count."""
    return sorted(
        {
            key.split(".", 1)[0] if key.startswith("lora_") else _ENDING.sub("", key)
            for key in tensors
            if not key.startswith(EMBEDDING)
        }
    )


def embeddings_of(tensors: dict[str, torch.Tensor]) -> list[str]:
    """Names of the embeddings bundled with a LoRA."""
    return sorted({key.split(".")[1] for key in tensors if key.startswith(EMBEDDING)})


@dataclass(frozen=True)
class Match:
    """How ComfyUI applies a file to one MODEL and CLIP.

    Attributes:
        applied: the file's layers that are applied.
        unused: the file's layers that are not.
        patches: by weight of the model (some keys also select a part of it); only for existing weights.
        shapes: shapes of the model's weights.
    """

    applied: list[str]
    unused: list[str]
    patches: dict[Any, Any]
    shapes: dict[str, torch.Size]


def match_keys(tensors: dict[str, torch.Tensor], model: ModelPatcher, clip: CLIP | None) -> Match:
    """Match the file's layers to this MODEL and CLIP.

    ComfyUI itself only logs a line for an unknown key or a layer that does not fit, and then samples without it.

    Raises:
        SubjectBoothError: a layer is incomplete, or does not fit its weight, whatever its type.
    """
    key_map: dict[str, Any] = comfy.lora.model_lora_keys_unet(model.model, {})
    if clip is not None:
        key_map = comfy.lora.model_lora_keys_clip(clip.cond_stage_model, key_map)
    layers = layers_of(tensors)
    try:
        patches = comfy.lora.load_lora(comfy.lora_convert.convert_lora(dict(tensors)), key_map)
    except Exception as error:  # half of a layer is missing, or its alpha is not a number
        raise SubjectBoothError(
            f"the LoRA has an incomplete layer ({type(error).__name__}: {str(error)[:100]})",
            "a complete LoRA file",
            "download or copy the file again",
        ) from error
    shapes = _shapes_of(model.model)
    if clip is not None:
        shapes |= _shapes_of(clip.patcher.model)
    patches = {key: patch for key, patch in patches.items() if _weight_name(key) in shapes}
    for key, patch in patches.items():
        if not fits(key, patch, shapes[_weight_name(key)]):
            raise SubjectBoothError(
                f"a layer of the LoRA has the shapes {_shapes_in(patch)}, but the model's weight has "
                f"{list(shapes[_weight_name(key)])}",
                "a LoRA for the family of the connected model",
                "choose another file, or connect the kind of checkpoint it was trained on",
                _weight_name(key),
            )
    changed = {_weight_name(key) for key in patches}
    taken = [layer for layer in layers if layer in key_map and changed & _weights_of(key_map[layer])]
    return Match(taken, [layer for layer in layers if layer not in taken], patches, shapes)


def _shapes_of(model: torch.nn.Module) -> dict[str, torch.Size]:
    """By the weights' names. A linear layer's is what it computes with: its weight may be kept packed."""
    shapes = {key: tensor.shape for key, tensor in model.state_dict().items()}
    for path, layer in model.named_modules():
        if f"{path}.weight" in shapes and hasattr(layer, "in_features") and hasattr(layer, "out_features"):
            shapes[f"{path}.weight"] = torch.Size([layer.out_features, layer.in_features])
    return shapes


def _weight_name(key: Any) -> str:
    """The weight that a patch applies to; some keys also select a part of it."""
    return key if isinstance(key, str) else key[0]


def _weights_of(key: Any) -> set[str]:
    """A layer's weight and bias; a file may patch either."""
    name = _weight_name(key)
    return {name, f"{name.removesuffix('.weight')}.bias"}


def _shapes_in(patch: Any) -> str:
    """``[320, 4] and [4, 320]`` of an adapter, or of a plain difference."""
    return " and ".join(str(list(tensor.shape)) for tensor in tensors_of(patch))


def require_all_keys(tensors: dict[str, torch.Tensor], model: ModelPatcher, clip: CLIP) -> int:
    """Check that ComfyUI applies every layer; return their number.

    Raises:
        SubjectBoothError: it does not; the error names the first such layer.
    """
    match = match_keys(tensors, model, clip)
    if match.unused:
        raise SubjectBoothError(
            f"ComfyUI applies only {len(match.applied)} of the LoRA's {len(match.applied) + len(match.unused)} layers",
            "all of them",
            "report this with the name of your checkpoint; the LoRA would only partly take effect",
            match.unused[0],
        )
    return len(match.applied)
