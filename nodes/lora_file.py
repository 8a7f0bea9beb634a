"""A trained adapter on an edge of the graph, and the check that ComfyUI takes every key of it."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import comfy.lora
import comfy.lora_convert
import comfy.utils
import torch
from comfy.model_patcher import ModelPatcher
from comfy.sd import CLIP

from ..trainer.errors import SubjectBoothError
from ..trainer.safefile import read_metadata


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
        return self.metadata.get("subjectbooth.trigger") or self.metadata.get("modelspec.trigger_phrase", "")


def load_lora_file(path: Path) -> SubjectLora:
    """Read a LoRA file, one of ours or a stranger's. Only safetensors: nothing here ever unpickles.

    Raises:
        SubjectBoothError: it is damaged or of another format.
    """
    if path.suffix.lower() != ".safetensors":
        raise SubjectBoothError(f"a LoRA file of the format {path.suffix or '(none)'}", "a .safetensors file",
                                "convert it, or load it with ComfyUI's own LoRA loader", path.name)
    metadata = read_metadata(path)
    try:
        tensors = comfy.utils.load_torch_file(str(path), safe_load=True)
    except Exception as error:  # whatever a damaged file does to its reader
        raise SubjectBoothError(f"a LoRA file that cannot be read ({type(error).__name__})",
                                "a whole safetensors file", "get the file again", path.name) from error
    return SubjectLora(path, tensors, metadata)


def layers_of(tensors: dict[str, torch.Tensor]) -> list[str]:
    """The layers a file has something for: its keys up to the first dot."""
    return sorted({key.split(".", 1)[0] for key in tensors})


def match_keys(tensors: dict[str, torch.Tensor], model: ModelPatcher, clip: CLIP | None) -> tuple[int, list[str]]:
    """How many of the file's layers ComfyUI takes for this MODEL and CLIP, and which it does not.

    ComfyUI itself only logs a line for a key it does not know, and then samples without it.
    """
    key_map: dict[str, str] = comfy.lora.model_lora_keys_unet(model.model, {})
    if clip is not None:
        key_map = comfy.lora.model_lora_keys_clip(clip.cond_stage_model, key_map)
    layers = layers_of(tensors)
    patches = comfy.lora.load_lora(comfy.lora_convert.convert_lora(dict(tensors)), key_map)
    taken = set(model.clone().add_patches(patches))
    if clip is not None:
        taken |= set(clip.clone().add_patches(patches))
    unmatched = [layer for layer in layers if layer not in key_map or key_map[layer] not in taken]
    return len(layers) - len(unmatched), unmatched


def require_all_keys(tensors: dict[str, torch.Tensor], model: ModelPatcher, clip: CLIP) -> int:
    """The number of layers, when ComfyUI takes every one of them.

    Raises:
        SubjectBoothError: it does not; the first layer is named.
    """
    matched, unmatched = match_keys(tensors, model, clip)
    if unmatched:
        raise SubjectBoothError(
            f"an adapter of which ComfyUI takes {matched} of {matched + len(unmatched)} layers",
            "all of them", "report this with the name of your checkpoint: the file would be half without effect",
            unmatched[0])
    return matched
