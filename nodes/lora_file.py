"""A trained adapter on an edge of the graph, and the check that ComfyUI takes every key of it."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import comfy.lora
import comfy.lora_convert
import torch
from comfy.model_patcher import ModelPatcher
from comfy.sd import CLIP
from comfy.weight_adapter.lora import LoRAAdapter

from ..trainer.errors import SubjectBoothError
from ..trainer.lora_reader import read_lora, trigger_words


@dataclass(frozen=True)
class SubjectLora:
    """What SUBJECT_LORA carries.

    Attributes:
        path: the published file.
        tensors: its tensors, with kohya's names.
        metadata: its metadata; the trigger words are in it.
    """

    path: Path
    tensors: dict[str, torch.Tensor]
    metadata: dict[str, str]

    @property
    def trigger(self) -> str:
        """The trained words ("ohwx dog"); empty for a stranger's file that does not say."""
        return trigger_words(self.metadata)


def load_lora_file(path: Path) -> SubjectLora:
    """Read a LoRA file, one of ours or a stranger's.

    Raises:
        SubjectBoothError: it is damaged or of another format.
    """
    tensors, metadata = read_lora(path)
    return SubjectLora(path, tensors, metadata)


def layers_of(tensors: dict[str, torch.Tensor]) -> list[str]:
    """The layers a file with kohya's names has something for: its keys up to the first dot."""
    return sorted({key.split(".", 1)[0] for key in tensors})


def extent_of(tensors: dict[str, torch.Tensor]) -> str:
    """How much is in a file: "12 layers", or tensors where the names (dotted, of any program) do not tell layers."""
    if all(key.startswith("lora_") for key in tensors):
        return f"{len(layers_of(tensors))} layers"
    return f"{len(tensors)} tensors"


def match_keys(
    tensors: dict[str, torch.Tensor], model: ModelPatcher, clip: CLIP | None,
) -> tuple[int, list[str], int]:
    """How much of the file ComfyUI takes for this MODEL and CLIP.

    ComfyUI itself only logs a line for a key it does not know, and then samples without it.

    Returns:
        How many of the file's layers it takes and which it does not, both for kohya's names only; and how many of the
        model's weights it changes, for any names that it knows.

    Raises:
        SubjectBoothError: a layer is incomplete, or has another shape than the model's.
    """
    key_map: dict[str, str] = comfy.lora.model_lora_keys_unet(model.model, {})
    if clip is not None:
        key_map = comfy.lora.model_lora_keys_clip(clip.cond_stage_model, key_map)
    layers = layers_of(tensors)
    try:
        patches = comfy.lora.load_lora(comfy.lora_convert.convert_lora(dict(tensors)), key_map)
    except Exception as error:  # half of a layer is missing, or its alpha is no number
        raise SubjectBoothError(f"a LoRA with an incomplete layer ({type(error).__name__}: {str(error)[:100]})",
                                "a whole LoRA file", "get the file again", "lora") from error
    shapes = {key: tensor.shape for key, tensor in model.model.state_dict().items()}
    if clip is not None:
        shapes |= {key: tensor.shape for key, tensor in clip.patcher.model.state_dict().items()}
    for key, patch in patches.items():
        _require_shape(key, patch, shapes)
    unmatched = [layer for layer in layers if layer not in key_map or key_map[layer] not in patches
                 or _weight_name(key_map[layer]) not in shapes]
    changed = sum(_weight_name(key) in shapes for key in patches)
    return len(layers) - len(unmatched), unmatched, changed


def _weight_name(key: Any) -> str:
    """The weight that a patch is for: some keys also say which part of it."""
    return key if isinstance(key, str) else key[0]


def _require_shape(key: Any, patch: Any, shapes: dict[str, torch.Size]) -> None:
    """ComfyUI only logs a line for a layer that does not fit, and then samples without it."""
    shape = shapes.get(_weight_name(key))
    if shape is None or not isinstance(key, str) or not isinstance(patch, LoRAAdapter):
        return
    up, down, _, mid, _, reshape = patch.weights
    if mid is not None or reshape is not None:  # another layout
        return
    rank = down.shape[0] if down.ndim > 1 else 0
    fits = (rank and up.ndim > 1 and up.flatten(1).shape[1] == rank
            and up.shape[0] * down.flatten(1).shape[1] == shape.numel() and up.shape[0] == shape[0])
    if not fits:
        raise SubjectBoothError(
            f"a LoRA whose layer has the shapes {list(up.shape)} and {list(down.shape)} where this model's has "
            f"{list(shape)}", "a LoRA for the wired model's family",
            "choose another file, or wire the kind of checkpoint it was trained on", _weight_name(key))


def require_all_keys(tensors: dict[str, torch.Tensor], model: ModelPatcher, clip: CLIP) -> int:
    """The number of layers, when ComfyUI takes every one of them.

    Raises:
        SubjectBoothError: it does not; the first layer is named.
    """
    matched, unmatched, _ = match_keys(tensors, model, clip)
    if unmatched:
        raise SubjectBoothError(
            f"an adapter of which ComfyUI takes {matched} of {matched + len(unmatched)} layers",
            "all of them", "report this with the name of your checkpoint: the file would be half without effect",
            unmatched[0])
    return matched
