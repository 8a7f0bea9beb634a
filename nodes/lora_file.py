"""A trained adapter on an edge of the graph, and the check that ComfyUI takes every key of it."""

from __future__ import annotations

import re
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import comfy.lora
import comfy.lora_convert
import torch
from comfy.model_patcher import ModelPatcher
from comfy.sd import CLIP

from ..trainer.errors import SubjectBoothError
from ..trainer.runs.lora_reader import read_lora, trigger_words
from .lora_effect import fits, tensors_of

EMBEDDING = "bundle_emb."
"""Begins the names of textual-inversion embeddings that A1111 bundles with a LoRA; ComfyUI does not read them."""

_ENDING = re.compile(
    r"([._]lora[._].*|\.(hada|lokr|oft|boft)_\w+|\.[ab][12]\.weight"
    r"|\.(alpha|dora_scale|diff|diff_b|set_weight|w_norm|b_norm|rescale|reshape_weight))$"
)
"""Of a tensor's name: what comes after the layer's, in the spellings that ComfyUI reads."""


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
    """The layers that a file has something for, whichever program named them; embeddings are none."""
    return sorted(
        {
            key.split(".", 1)[0] if key.startswith("lora_") else _ENDING.sub("", key)
            for key in tensors
            if not key.startswith(EMBEDDING)
        }
    )


def embeddings_of(tensors: dict[str, torch.Tensor]) -> list[str]:
    """The names of the embeddings that are bundled with a LoRA."""
    return sorted({key.split(".")[1] for key in tensors if key.startswith(EMBEDDING)})


@dataclass(frozen=True)
class Match:
    """What ComfyUI makes of a file for one MODEL and CLIP.

    Attributes:
        taken: the file's layers that it uses.
        left: those that it does not.
        patches: by the model's weight (some keys also name a part of it), only for weights that are there.
        shapes: of the model's weights.
    """

    taken: list[str]
    left: list[str]
    patches: dict[Any, Any]
    shapes: dict[str, torch.Size]


def match_keys(tensors: dict[str, torch.Tensor], model: ModelPatcher, clip: CLIP | None) -> Match:
    """How much of the file ComfyUI takes for this MODEL and CLIP.

    ComfyUI itself only logs a line for a key that it does not know or a layer that does not fit, and then samples
    without it.

    Raises:
        SubjectBoothError: a layer is incomplete, or does not fit the weight that it is for, whatever its kind.
    """
    key_map: dict[str, Any] = comfy.lora.model_lora_keys_unet(model.model, {})
    if clip is not None:
        key_map = comfy.lora.model_lora_keys_clip(clip.cond_stage_model, key_map)
    layers = layers_of(tensors)
    try:
        patches = comfy.lora.load_lora(comfy.lora_convert.convert_lora(dict(tensors)), key_map)
    except Exception as error:  # half of a layer is missing, or its alpha is no number
        raise SubjectBoothError(
            f"a LoRA with an incomplete layer ({type(error).__name__}: {str(error)[:100]})",
            "a whole LoRA file",
            "get the file again",
            "lora",
        ) from error
    shapes = {key: tensor.shape for key, tensor in model.model.state_dict().items()}
    if clip is not None:
        shapes |= {key: tensor.shape for key, tensor in clip.patcher.model.state_dict().items()}
    patches = {key: patch for key, patch in patches.items() if _weight_name(key) in shapes}
    for key, patch in patches.items():
        if not fits(key, patch, shapes[_weight_name(key)]):
            raise SubjectBoothError(
                f"a LoRA whose layer has the shapes {_shapes_in(patch)} where this model's has "
                f"{list(shapes[_weight_name(key)])}",
                "a LoRA for the wired model's family",
                "choose another file, or wire the kind of checkpoint it was trained on",
                _weight_name(key),
            )
    changed = {_weight_name(key) for key in patches}
    taken = [layer for layer in layers if layer in key_map and changed & _weights_of(key_map[layer])]
    return Match(taken, [layer for layer in layers if layer not in taken], patches, shapes)


def _weight_name(key: Any) -> str:
    """The weight that a patch is for: some keys also say which part of it."""
    return key if isinstance(key, str) else key[0]


def _weights_of(key: Any) -> set[str]:
    """A layer's weight and bias: a file may have something for either."""
    name = _weight_name(key)
    return {name, f"{name.removesuffix('.weight')}.bias"}


def _shapes_in(patch: Any) -> str:
    """``[320, 4] and [4, 320]`` of an adapter, or of a plain difference."""
    return " and ".join(str(list(tensor.shape)) for tensor in tensors_of(patch))


def require_all_keys(tensors: dict[str, torch.Tensor], model: ModelPatcher, clip: CLIP) -> int:
    """The number of layers, when ComfyUI takes every one of them.

    Raises:
        SubjectBoothError: it does not; the first layer is named.
    """
    match = match_keys(tensors, model, clip)
    if match.left:
        raise SubjectBoothError(
            f"an adapter of which ComfyUI takes {len(match.taken)} of {len(match.taken) + len(match.left)} layers",
            "all of them",
            "report this with the name of your checkpoint: the file would be half without effect",
            match.left[0],
        )
    return len(match.taken)
