"""The choice of a LoRA, wired or from a file, and how it is applied; shared by the nodes that take one."""

from __future__ import annotations

import logging
import math
import uuid
import weakref
from functools import lru_cache
from pathlib import Path
from typing import Any

import comfy.sd
import folder_paths
import torch
from comfy.model_patcher import ModelPatcher
from comfy.sd import CLIP
from comfy_api.latest import io

from ..trainer.errors import SubjectBoothError
from ..trainer.files.storage import sha256_of
from ..trainer.runs.lora_reader import peft_config_path
from .lora_effect import has_no_effect, tensors_of
from .lora_file import Match, SubjectLora, embeddings_of, load_lora_file, match_keys, state_of

log = logging.getLogger("subjectbooth")

NO_FILE = "(from subject_lora)"
ABSENT = object()
"""Default of ``subject_lora`` in ``validate_inputs``: a linked input arrives as None, an unlinked one not at all."""


def lora_name_input() -> io.Combo.Input:
    """The list of files, which a wired subject_lora stands in for."""
    return io.Combo.Input(
        "lora_name",
        options=[NO_FILE, *folder_paths.get_filename_list("loras")],
        default=NO_FILE,
        tooltip="A file from models/loras, used if subject_lora is not connected.",
    )


def strength_input(name: str, tooltip: str) -> io.Float.Input:
    """A strength of the LoRA; see :func:`check_strength`."""
    return io.Float.Input(name, default=1.0, min=-10.0, max=10.0, step=0.05, round=0.001, tooltip=tooltip)


def check_lora_name(lora_name: str | None, subject_lora: Any, node_id: str) -> bool | str:
    """For ``validate_inputs``: ComfyUI would check the file against a list from before the training.

    Args:
        lora_name: None if it is linked.
        subject_lora: :data:`ABSENT` if it is not linked.
    """
    if lora_name is None:
        return True
    try:
        _require_one(lora_name, wired=subject_lora is not ABSENT, node_id=node_id)
        if lora_name != NO_FILE:
            lora_path(str(lora_name), node_id)
    except SubjectBoothError as error:
        return str(error)
    return True


def lora_fingerprint(lora_name: str | None) -> str:
    """A hash of the file, so that a retrained file of the same name is not served from ComfyUI's cache."""
    if lora_name in (None, NO_FILE):
        return ""
    try:
        path = lora_path(str(lora_name))
        return _digest_of(path, state_of(path))
    except (SubjectBoothError, OSError) as error:
        return str(error)


@lru_cache(maxsize=64)
def _digest_of(path: Path, state: tuple[object, ...]) -> str:
    return sha256_of(path, *filter(None, [peft_config_path(path)]))


def chosen_lora(lora_name: str, subject_lora: SubjectLora | None, node_id: str) -> SubjectLora:
    """The wired LoRA, or that of the file.

    Raises:
        SubjectBoothError: both are given, or neither; the file is missing, damaged or not a LoRA.
    """
    _require_one(lora_name, wired=subject_lora is not None, node_id=node_id)  # again, as lora_name may be linked
    return subject_lora or load_lora_file(lora_path(lora_name, node_id))


def apply_lora(
    model: ModelPatcher, clip: CLIP, lora: SubjectLora, strength_model: float, strength_clip: float
) -> tuple[ModelPatcher, CLIP, list[str]]:
    """The model and text encoder with the LoRA, and lines on what of it is used, for the node to show.

    Raises:
        SubjectBoothError: no layer fits this model, or one is incomplete or of another size.
    """
    if strength_model == 0 and strength_clip == 0:
        return model, clip, ["not applied: the strength is 0"]
    match = _match_of(lora, model, clip)
    if not match.patches:
        raise SubjectBoothError(
            f"none of the LoRA's {len(match.unused)} layers fit this model",
            "a LoRA for the family of the connected model",
            "choose another file, or connect the kind of checkpoint it was trained on",
            lora.path.name,
        )
    notes = _notes(lora, match)
    for note in notes:
        log.warning("%s: %s", lora.path.name, note)
    applied, applied_clip = comfy.sd.load_lora_for_models(model, clip, lora.tensors, strength_model, strength_clip)
    _identify(applied, model, lora, strength_model)
    _identify(applied_clip.patcher, clip.patcher, lora, strength_clip)
    return applied, applied_clip, notes if match.unused else [f"applied: all {len(match.applied)} layers", *notes]


def _identify(applied: ModelPatcher, source: ModelPatcher, lora: SubjectLora, strength: float) -> None:
    """Give equal patches the same identity, by which ComfyUI knows that loaded weights have them already: otherwise,
    whenever a prompt on the node is edited, all of them would be restored and patched again."""
    applied.patches_uuid = uuid.uuid5(source.patches_uuid, f"{lora.digest} {strength}")


_last_match: tuple[str, weakref.ref[Any], weakref.ref[Any], Match] | None = None


def _match_of(lora: SubjectLora, model: ModelPatcher, clip: CLIP) -> Match:
    """That of :func:`match_keys`; the last one is kept."""
    global _last_match
    digest, network, text = lora.digest, model.model, clip.cond_stage_model
    if _last_match is None or (_last_match[0], _last_match[1](), _last_match[2]()) != (digest, network, text):
        _last_match = digest, weakref.ref(network), weakref.ref(text), match_keys(lora.tensors, model, clip)
    return _last_match[3]


def refuse_applied(model: ModelPatcher, clip: CLIP, lora: SubjectLora) -> None:
    """Reject a model that has the LoRA already, where the base without it is needed.

    Raises:
        SubjectBoothError: a patch of the model or text encoder contains a matrix of the LoRA.
    """
    matrices = [tensor for tensor in lora.tensors.values() if tensor.ndim > 1 and tensor.any()]
    for patcher, where in ((model, "MODEL"), (clip.patcher, "CLIP")):
        applied = (
            tensor for patches in patcher.patches.values() for patch in patches for tensor in tensors_of(patch[1])
        )
        if any(
            tensor.shape == other.shape and torch.equal(tensor.cpu(), other.cpu().to(tensor.dtype))
            for tensor in applied
            for other in matrices
        ):
            raise SubjectBoothError(
                f"the {where} already has the LoRA {lora.path.name}",
                f"the {where} without it",
                "connect what is connected to the trainer, not the output of Apply Subject LoRA",
                where,
            )


def check_strength(name: str, strength: float) -> None:
    """Reject NaN, which ComfyUI's range check lets pass.

    Raises:
        SubjectBoothError: it is not a finite number.
    """
    if not math.isfinite(strength):
        raise SubjectBoothError(f"{name} {strength}", "a number from -10 to 10", f"set {name} to 1", name)


def _notes(lora: SubjectLora, match: Match) -> list[str]:
    """Notes on what in the file is not used or has no effect."""
    notes = []
    if match.unused:
        layers = len(match.applied) + len(match.unused)
        notes.append(
            f"Only {len(match.applied)} of {layers} layers fit this model; the others, such as "
            f"{match.unused[0][:80]!r}, are not used. Was the LoRA trained on another kind of checkpoint?"
        )
    if embeddings := embeddings_of(lora.tensors):
        notes.append(
            f"The file contains {len(embeddings)} embedding{'s' * (len(embeddings) > 1)} ({embeddings[0][:40]!r}"
            f"{', ...' * (len(embeddings) > 1)}), not used here; save each as a file in models/embeddings."
        )
    if has_no_effect(match.patches, match.shapes):
        notes.append("The LoRA has no effect: it does not change any weight of this model.")
    return notes


def _require_one(lora_name: str, *, wired: bool, node_id: str) -> None:
    if wired and lora_name != NO_FILE:
        raise SubjectBoothError(
            f"both subject_lora and the file {lora_name!r} are given",
            "one of the two",
            f"set lora_name to {NO_FILE!r}, or disconnect subject_lora",
            node_id,
        )
    if not wired and lora_name == NO_FILE:
        raise SubjectBoothError(
            "no LoRA is given",
            "a connection to subject_lora or a file in lora_name",
            "connect DreamBooth LoRA Training, or choose a file",
            node_id,
        )


def lora_path(lora_name: str, where: str = "lora_name") -> Path:
    """The path of a file from the node's list.

    Raises:
        SubjectBoothError: ComfyUI's LoRA folders do not contain it.
    """
    # get_full_path cleans names up; a link or a name with ".." is rejected instead.
    known = folder_paths.get_filename_list("loras")
    if lora_name not in known:
        raise SubjectBoothError(
            f"lora_name {lora_name!r} was not found",
            "a file in models/loras",
            "refresh the node definitions (R) and choose again",
            where,
        )
    return Path(folder_paths.get_full_path_or_raise("loras", lora_name))
