"""ApplySubjectLoRA: applies a trained subject to MODEL and CLIP and fills its words into a prompt."""

from __future__ import annotations

import logging
import math
from pathlib import Path
from typing import Any

import comfy.sd
import folder_paths
from comfy_api.latest import io

from ..trainer.errors import SubjectBoothError
from ..trainer.files.storage import sha256_of
from ..trainer.runs.lora_reader import peft_config_path
from .graph_terms import graph_messages
from .host import Progress
from .lora_effect import has_no_effect
from .lora_file import Match, SubjectLora, embeddings_of, load_lora_file, match_keys
from .types import CATEGORY, SubjectLoraType

log = logging.getLogger("subjectbooth")

NO_FILE = "(from subject_lora)"
_ABSENT = object()


class ApplySubjectLoRA(io.ComfyNode):
    """Takes the LoRA from the trainer's output or from a file, and reads the trained words from its metadata."""

    @classmethod
    def define_schema(cls) -> io.Schema:
        """The node as ComfyUI shows it."""
        return io.Schema(
            node_id="ApplySubjectLoRA",
            display_name="Apply Subject LoRA",
            category=CATEGORY,
            description="Applies a trained subject to MODEL and CLIP and fills its words into your prompt.",
            inputs=[
                io.Model.Input("model", tooltip="The model to apply the subject to."),
                io.Clip.Input("clip", tooltip="The text encoder to apply the subject to."),
                io.Combo.Input(
                    "lora_name",
                    options=[NO_FILE, *folder_paths.get_filename_list("loras")],
                    default=NO_FILE,
                    tooltip="A file from models/loras, used if subject_lora is not connected.",
                ),
                io.Float.Input(
                    "strength_model",
                    default=1.0,
                    min=-10.0,
                    max=10.0,
                    step=0.05,
                    round=0.001,
                    tooltip="How strongly to apply the LoRA to the model. 0: not at all.",
                ),
                io.Float.Input(
                    "strength_clip",
                    default=1.0,
                    min=-10.0,
                    max=10.0,
                    step=0.05,
                    round=0.001,
                    tooltip="How strongly to apply the LoRA to the text encoder, if that was trained.",
                ),
                io.String.Input(
                    "prompt",
                    multiline=True,
                    default="a photo of {subject}",
                    tooltip="Your prompt. {subject} is replaced by the trained words, such as ohwx dog.",
                ),
                SubjectLoraType.Input("subject_lora", optional=True, tooltip="From DreamBooth LoRA Train."),
            ],
            outputs=[
                io.Model.Output(display_name="model", tooltip="The model with the subject applied."),
                io.Clip.Output(display_name="clip", tooltip="The text encoder with the subject applied."),
                io.String.Output(display_name="prompt", tooltip="The prompt with the trained words filled in."),
            ],
            hidden=[io.Hidden.unique_id],
        )

    @classmethod
    def validate_inputs(cls, lora_name: str | None = None, subject_lora: Any = _ABSENT) -> bool | str:
        """Check the file here: ComfyUI would check it against a list from before the training.

        A linked input arrives as None, an unlinked subject_lora not at all.
        """
        if lora_name is None:
            return True
        try:
            _require_one(lora_name, wired=subject_lora is not _ABSENT)
            if lora_name != NO_FILE:
                lora_path(str(lora_name))
        except SubjectBoothError as error:
            return str(error)
        return True

    @classmethod
    def fingerprint_inputs(cls, lora_name: str | None = None, **_: Any) -> str:
        """A hash of the file, so that a retrained file of the same name is not served from ComfyUI's cache."""
        if lora_name in (None, NO_FILE):
            return ""
        try:
            path = lora_path(str(lora_name))
            return sha256_of(path, *filter(None, [peft_config_path(path)]))
        except (SubjectBoothError, OSError) as error:
            return str(error)

    @classmethod
    @graph_messages()
    def execute(
        cls,
        model: Any,
        clip: Any,
        lora_name: str,
        strength_model: float,
        strength_clip: float,
        prompt: str,
        subject_lora: SubjectLora | None = None,
    ) -> io.NodeOutput:
        """Apply the LoRA and fill in the prompt."""
        _require_one(lora_name, wired=subject_lora is not None)  # again, as lora_name may be linked
        lora = subject_lora or load_lora_file(lora_path(lora_name))
        for name, strength in (("strength_model", strength_model), ("strength_clip", strength_clip)):
            if not math.isfinite(strength):  # ComfyUI's range check lets NaN pass
                raise SubjectBoothError(f"{name} {strength}", "a number from -10 to 10", f"set {name} to 1", name)
        filled = _fill(prompt, lora)
        if strength_model == 0 and strength_clip == 0:
            return cls._output(model, clip, filled, ["not applied: both strengths are 0"])
        match = match_keys(lora.tensors, model, clip)
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
        model, clip = comfy.sd.load_lora_for_models(model, clip, lora.tensors, strength_model, strength_clip)
        text = notes if match.unused else [f"applied: all {len(match.applied)} layers", *notes]
        return cls._output(model, clip, filled, text)

    @classmethod
    def _output(cls, model: Any, clip: Any, prompt: str, text: list[str]) -> io.NodeOutput:
        """Always with a line of text: without one, the editor keeps showing that of the previous run."""
        Progress(cls.hidden.unique_id, 1).set_text("\n".join(text))
        return io.NodeOutput(model, clip, prompt, ui={"text": text})


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


def _require_one(lora_name: str, *, wired: bool) -> None:
    if wired and lora_name != NO_FILE:
        raise SubjectBoothError(
            f"both subject_lora and the file {lora_name!r} are given",
            "one of the two",
            f"set lora_name to {NO_FILE!r}, or disconnect subject_lora",
            "ApplySubjectLoRA",
        )
    if not wired and lora_name == NO_FILE:
        raise SubjectBoothError(
            "no LoRA is given",
            "a connection to subject_lora or a file in lora_name",
            "connect DreamBooth LoRA Train, or choose a file",
            "ApplySubjectLoRA",
        )


def _fill(prompt: str, lora: SubjectLora) -> str:
    if "{subject}" not in prompt:
        return prompt
    if not lora.trigger:
        raise SubjectBoothError(
            "the LoRA file does not contain its trigger words",
            "the words it was trained with",
            "write them into the prompt instead of {subject}",
            lora.path.name,
        )
    return prompt.replace("{subject}", lora.trigger)


def lora_path(lora_name: str) -> Path:
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
            "ApplySubjectLoRA",
        )
    return Path(folder_paths.get_full_path_or_raise("loras", lora_name))
