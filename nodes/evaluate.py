"""EvaluateSubjectLoRA: the same prompts and seeds with and without a LoRA, as a table and a grid."""

from __future__ import annotations

import logging
import time
from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from comfy.model_patcher import ModelPatcher
from comfy.sd import CLIP, VAE
from comfy_api.latest import io
from PIL import Image

from ..trainer.errors import SubjectBoothError
from ..trainer.files.storage import canonical_json, sha256_of
from ..trainer.measure.evaluation import Evaluation, evaluate
from ..trainer.measure.prompts import PromptSet
from ..trainer.subject.subject import Subject, check_resolution
from .base import check_base
from .bridge import base_digest, latent_factor
from .evaluation_files import SavedEvaluation
from .evaluation_prompts import check_lines, prompts_for
from .graph_terms import graph_messages
from .host import Progress, pack_output_dir, readable_seconds, versioned_entry
from .lora_choice import (
    ABSENT,
    apply_lora,
    check_lora_name,
    check_strength,
    chosen_lora,
    lora_fingerprint,
    lora_name_input,
    refuse_applied,
    strength_input,
)
from .lora_file import SubjectLora
from .picture_embedder import embedder_for
from .presentation import presented
from .prompt_pictures import Drawing, PromptPictures
from .sampling import automatic_batch_size, check_choices, sampler_inputs, without_guidance_patches
from .types import CATEGORY, SubjectLoraType, SubjectType

log = logging.getLogger("subjectbooth")

NODE_ID = "EvaluateSubjectLoRA"

SHOWN = ("lora_name", "strength", "prompts", "seeds", "steps", "cfg")
"""Inputs in sight; the others are under the editor's "advanced inputs"."""


class EvaluateSubjectLoRA(io.ComfyNode):
    """Draws what a LoRA should change and what it should not, from the same seeds with and without it.

    Pictures are kept like class images: a cancelled evaluation resumes, and another LoRA of the same base only draws
    its own half.
    """

    @classmethod
    def define_schema(cls) -> io.Schema:
        """The node as ComfyUI shows it. Inputs are appended, never inserted: workflows store values by position."""
        schema = io.Schema(
            node_id=NODE_ID,
            display_name="Evaluate Subject LoRA",
            category=CATEGORY,
            description="Measures a trained LoRA: draws your subject, its class and other things from the same seeds "
            "with and without it, and shows how well the subject is drawn and how much else has changed.",
            is_output_node=True,
            inputs=[
                io.Model.Input("model", tooltip="The model without the LoRA: use the one connected to the trainer."),
                io.Clip.Input("clip", tooltip="Its text encoder, without the LoRA."),
                io.Vae.Input("vae", tooltip="Decodes the pictures."),
                SubjectType.Input(
                    "subject", tooltip="Photos to compare with, the class, and the size of the pictures."
                ),
                lora_name_input(),
                strength_input("strength", "How strongly to apply the LoRA to the model and the text encoder."),
                io.String.Input(
                    "prompts",
                    multiline=True,
                    default="",
                    tooltip="Your own prompts, one per line. Those with {subject} are drawn with the subject and with "
                    "its class, in place of the built-in scenes; the others should not show the class, and replace "
                    "the 24 built-in prompts of other things. Empty: built-in prompts only.",
                ),
                io.Int.Input(
                    "seeds",
                    default=4,
                    min=2,
                    max=64,
                    tooltip="Pictures per prompt, with and without the LoRA each. More make the figures more reliable.",
                ),
                *sampler_inputs(
                    "picture", seed="Seed of each prompt's first picture; each further picture uses the next seed."
                ),
                io.Int.Input(
                    "resolution",
                    default=0,
                    min=0,
                    max=4096,
                    step=8,
                    tooltip="Width and height of the pictures in pixels. 0: use that of Load Subject Images.",
                ),
                SubjectLoraType.Input("subject_lora", optional=True, tooltip="From DreamBooth LoRA Training."),
                io.ClipVision.Input(
                    "clip_vision",
                    optional=True,
                    tooltip="A CLIP or DINOv2 model from Load CLIP Vision, which compares the pictures. Without it, "
                    "there are pictures but no figures.",
                ),
            ],
            outputs=[
                io.Image.Output(display_name="grid", tooltip="All pictures with their prompts, without and with it."),
                io.String.Output(display_name="table", tooltip="The figures as a Markdown table."),
                io.String.Output(display_name="figures", tooltip="Figures, prompts and settings as JSON."),
                io.Image.Output(
                    display_name="before", tooltip="The pictures without the LoRA, at most 256 pixels wide and high."
                ),
                io.Image.Output(display_name="after", tooltip="The same pictures with the LoRA, in the same order."),
            ],
            hidden=[io.Hidden.unique_id],
        )
        return presented(schema, SHOWN)

    @classmethod
    def validate_inputs(
        cls, lora_name: str | None = None, subject_lora: Any = ABSENT, prompts: str | None = None
    ) -> bool | str:
        """Check the LoRA and the prompts before anything runs, and in particular before a training."""
        try:
            check_lines(prompts or "")
        except SubjectBoothError as error:
            return str(error)
        return check_lora_name(lora_name, subject_lora, NODE_ID)

    @classmethod
    def fingerprint_inputs(cls, lora_name: str | None = None, **_: Any) -> str:
        """Changes with the content of the file."""
        return lora_fingerprint(lora_name)

    @classmethod
    @graph_messages()
    def execute(
        cls,
        model: ModelPatcher,
        clip: CLIP,
        vae: VAE,
        subject: Subject,
        lora_name: str,
        strength: float,
        prompts: str,
        seeds: int,
        steps: int,
        cfg: float,
        sampler_name: str,
        scheduler: str,
        seed: int,
        resolution: int,
        subject_lora: SubjectLora | None = None,
        clip_vision: Any = None,
    ) -> io.NodeOutput:
        """Draw, compare and report."""
        check_base(model, clip, vae)
        check_choices(sampler_name, scheduler, cfg)
        check_strength("strength", strength)
        lora = chosen_lora(lora_name, subject_lora, NODE_ID)
        side = check_resolution(resolution or subject.resolution)
        embedder, others = embedder_for(clip_vision, model)
        prompt_set = prompts_for(prompts, subject, lora.trigger, others)
        refuse_applied(model, clip, lora)
        lora_model, lora_clip, notes = apply_lora(model, clip, lora, strength, strength)
        photos = list(subject.prepare(side, with_masks=False).images)
        batch_size = min(seeds, automatic_batch_size(model, side, latent_factor(vae), sampler_name))
        drawing = Drawing(side, sampler_name, scheduler, steps, cfg, seed, batch_size)
        digest = base_digest(model, clip)
        changed = sha256_of(digest, lora.digest, canonical_json(strength)) if strength else digest
        root = pack_output_dir() / "class_images"
        base = PromptPictures(model, clip, vae, prompt_set.all, drawing, digest, root)
        same_text = base if _patches(lora_clip) == _patches(clip) else None
        sides = base, PromptPictures(lora_model, lora_clip, vae, prompt_set.all, drawing, changed, root, same_text)
        progress = _Drawn(cls.hidden.unique_id, sides, prompt_set, seeds, steps)
        progress.show("encoding the prompts")
        evaluation = None
        for event in evaluate(progress.draw, embedder, prompt_set, progress.seeds(seed), photos):
            evaluation = event if isinstance(event, Evaluation) else None
        assert evaluation is not None
        notes += _notes(model, subject, lora)
        saved = SavedEvaluation.save(
            evaluation,
            {
                "lora": lora.path.name,
                "lora_digest": lora.digest,
                "base_digest": base_digest(model, clip, vae),
                "strength": strength,
                "resolution": side,
                "steps": steps,
                "cfg": cfg,
                "sampler_name": sampler_name,
                "scheduler": scheduler,
            },
            notes,
        )
        for note in notes:
            log.info("%s: %s", lora.path.name, note)
        Progress(cls.hidden.unique_id, 1).set_text("\n".join(saved.lines))
        ui = {"images": [versioned_entry(saved.picture)], "text": saved.lines, "made": [progress.total]}
        before, after = (_batch([getattr(row, name) for row in evaluation.rows]) for name in ("before", "after"))
        return io.NodeOutput(_image(saved.grid), saved.table, saved.figures, before, after, ui=ui)


class _Drawn:
    """Draws pictures and moves the node's bar with each denoising step.

    Args:
        sides: without and with the LoRA.
        count: pictures per prompt.
        steps: denoising steps per picture.

    Attributes:
        total: pictures that had to be drawn.
    """

    def __init__(
        self,
        node_id: str | None,
        sides: tuple[PromptPictures, PromptPictures],
        prompts: PromptSet,
        count: int,
        steps: int,
    ) -> None:
        self._sides, self._count, self._steps = sides, count, steps
        self.total = sum(side.missing(prompt, count) for side in sides for prompt in prompts.all)
        self._progress = Progress(node_id, self.total * steps)
        self._done = 0.0
        self._started = time.monotonic()

    def seeds(self, first: int) -> list[int]:
        """The seeds of a prompt's pictures."""
        return [(first + index) % 2**64 for index in range(self._count)]

    def show(self, text: str) -> None:
        """Show a line before there are steps to count, if there is anything to draw."""
        if self.total:
            self._progress.set_text(text)

    def draw(self, prompt: str, seeds: Sequence[int], with_lora: bool) -> torch.Tensor:
        """See :data:`trainer.measure.evaluation.Draw`."""
        before = self._done

        def on_step(pictures: float, preview: Image.Image | None) -> None:
            self._done = before + pictures
            left = (time.monotonic() - self._started) / self._done * (self.total - self._done)
            half = "with" if with_lora else "without"
            text = f"{int(self._done)} of {self.total} pictures, {readable_seconds(left)} left"
            self._progress.update(round(self._done * self._steps), f'{text}\n{half} the LoRA: "{prompt}"', preview)

        return self._sides[with_lora].draw(prompt, len(seeds), on_step)


def _notes(model: ModelPatcher, subject: Subject, lora: SubjectLora) -> list[str]:
    notes = []
    if dropped := without_guidance_patches(model)[1]:
        notes.append(f"Guidance and attention patches on MODEL ({', '.join(dropped)}) are not used here.")
    if lora.trigger and lora.trigger != subject.trigger:
        notes.append(
            f'The LoRA was trained with "{lora.trigger}", which is used here, and the connected subject is '
            f'"{subject.trigger}".'
        )
    return notes


def _patches(clip: CLIP) -> dict[str, int]:
    """How many patches each weight of a text encoder has: a LoRA without any for it leaves them as they were."""
    return {name: len(patches) for name, patches in clip.patcher.patches.items()}


def _batch(pictures: list[torch.Tensor]) -> torch.Tensor:
    """uint8 [n, 3, h, w] each, as one IMAGE."""
    return torch.cat(pictures).movedim(1, -1) / 255.0


def _image(picture: Image.Image) -> torch.Tensor:
    return torch.from_numpy(np.array(picture.convert("RGB")))[None] / 255.0
