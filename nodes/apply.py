"""ApplySubjectLoRA: applies a trained subject to MODEL and CLIP and fills its words into a prompt."""

from __future__ import annotations

from typing import Any

from comfy_api.latest import io

from ..trainer.errors import SubjectBoothError
from ..trainer.subject.captions import fill_template
from .bridge import literal_prompt
from .evaluation_prompts import of_the_class
from .graph_terms import graph_messages
from .host import Progress
from .lora_choice import (
    ABSENT,
    apply_lora,
    check_lora_name,
    check_strength,
    chosen_lora,
    lora_fingerprint,
    lora_name_input,
    strength_input,
)
from .lora_file import SubjectLora
from .presentation import presented
from .types import CATEGORY, SubjectLoraType

SHOWN = ("lora_name", "strength_model", "prompt")
"""Inputs in sight; the others are under the editor's "advanced inputs"."""


class ApplySubjectLoRA(io.ComfyNode):
    """Takes the LoRA from the trainer's output or from a file, and reads the trained words from its metadata."""

    @classmethod
    def define_schema(cls) -> io.Schema:
        """The node as ComfyUI shows it."""
        schema = io.Schema(
            node_id="ApplySubjectLoRA",
            display_name="Apply Subject LoRA (DreamBooth)",
            category=CATEGORY,
            description="Applies a trained subject to MODEL and CLIP and fills its words into your prompt.",
            inputs=[
                io.Model.Input("model", tooltip="The model to apply the subject to."),
                io.Clip.Input("clip", tooltip="The text encoder to apply the subject to."),
                lora_name_input(),
                strength_input("strength_model", "How strongly to apply the LoRA to the model. 0: not at all."),
                strength_input(
                    "strength_clip", "How strongly to apply the LoRA to the text encoder, if that was trained."
                ),
                io.String.Input(
                    "prompt",
                    multiline=True,
                    default="a photo of {subject}",
                    tooltip="Your prompt. {subject} is replaced by the trained words, such as ohwx dog.",
                ),
                SubjectLoraType.Input("subject_lora", optional=True, tooltip="From DreamBooth LoRA Training."),
            ],
            outputs=[
                io.Model.Output(display_name="model", tooltip="The model with the subject applied."),
                io.Clip.Output(display_name="clip", tooltip="The text encoder with the subject applied."),
                io.String.Output(display_name="prompt", tooltip="The prompt with the trained words filled in."),
                io.String.Output(
                    display_name="class_prompt",
                    tooltip="The same prompt about the class, a dog in place of ohwx dog: for a comparison without the "
                    "subject.",
                ),
            ],
            hidden=[io.Hidden.unique_id],
        )
        return presented(schema, SHOWN)

    @classmethod
    def validate_inputs(cls, lora_name: str | None = None, subject_lora: Any = ABSENT) -> bool | str:
        """Check the choice before anything runs."""
        return check_lora_name(lora_name, subject_lora, "ApplySubjectLoRA")

    @classmethod
    def fingerprint_inputs(cls, lora_name: str | None = None, **_: Any) -> str:
        """Changes with the content of the file."""
        return lora_fingerprint(lora_name)

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
        lora = chosen_lora(lora_name, subject_lora, "ApplySubjectLoRA")
        check_strength("strength_model", strength_model)
        check_strength("strength_clip", strength_clip)
        filled = _fill(prompt, lora)
        model, clip, text = apply_lora(model, clip, lora, strength_model, strength_clip)
        return cls._output(model, clip, filled, _about_the_class(prompt, lora), text)

    @classmethod
    def _output(cls, model: Any, clip: Any, prompt: str, class_prompt: str, text: list[str]) -> io.NodeOutput:
        """Always with a line of text: without one, the editor keeps showing that of the previous run."""
        Progress(cls.hidden.unique_id, 1).set_text("\n".join(text))
        return io.NodeOutput(model, clip, prompt, class_prompt, ui={"text": text})


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


def _about_the_class(prompt: str, lora: SubjectLora) -> str:
    """The prompt with the class in place of the subject; as it is filled in if the file does not name a class."""
    class_word = lora.metadata.get("subjectbooth.class_word", "").strip()
    if not class_word or not class_word.isprintable():
        return _fill(prompt, lora)
    words = literal_prompt(class_word)
    lines = prompt.split("\n")
    return "\n".join(fill_template(of_the_class(line), "", words) if "{subject}" in line else line for line in lines)
