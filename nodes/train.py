"""DreamBoothLoRATrain: trains a LoRA from photos and class images and passes it on in the same run."""

from __future__ import annotations

import logging
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import comfy.model_management
import torch
from comfy_api.latest import io
from comfy_execution.graph_utils import ExecutionBlocker

from ..trainer.errors import SubjectBoothError, check_choice
from ..trainer.preserve.priors import ClassPriors
from ..trainer.preserve.ways import DEFAULT_WAY, PRESERVATION_HELP, WAYS, keeping_class
from ..trainer.runs.cleanup import over_limit_note, remember_lora_folders
from ..trainer.runs.publish import checked_name, publish
from ..trainer.runs.run import Run
from ..trainer.runs.step_grid import write_step_grid
from ..trainer.subject.subject import Subject
from . import live, published
from .base import run_of
from .base_graph import keep_base_graph, model_files
from .class_pictures import class_pictures_shown
from .graph_terms import graph_messages, notes_in_graph
from .host import (
    Progress,
    as_image,
    clean_up,
    loras_dirs,
    pack_output_dir,
    place_of,
    view_entry,
)
from .lora_file import SubjectLora, load_lora_file, require_all_keys
from .presentation import presented
from .presets import CUSTOM, PRESETS, TOOLTIP, described, with_preset
from .settings import config_from, setting_input
from .train_report import end_state, follow, not_drawn_note, result_of, summary
from .types import CATEGORY, ClassPriorsType, DreamBoothOptionsType, SubjectLoraType, SubjectType
from .usual import usual_line, with_usual
from .wired.families import family_of
from .wired_checks import ignored_patches

log = logging.getLogger("subjectbooth")

AFTER_STOP = ("keep", "continue")

USUAL = "what is usual for the connected model"

SHOWN = ("preset", "steps", "learning_rate", "rank", "preservation", "output_name", "validation_prompts")
"""Inputs in sight; the others are under the editor's "advanced inputs"."""


class DreamBoothLoRATrain(io.ComfyNode):
    """Trains on the connected MODEL, or reuses the run with the same inputs from its folder."""

    @classmethod
    def define_schema(cls) -> io.Schema:
        """The node as ComfyUI shows it. Inputs are appended, never inserted: workflows store values by position."""
        schema = io.Schema(
            node_id="DreamBoothLoRATrain",
            display_name="DreamBooth LoRA Training",
            category=CATEGORY,
            description="Trains a LoRA of your subject on the connected model and passes it on to the sampler in the "
            "same run. The same inputs never train twice; a cancelled run resumes where it stopped.",
            is_output_node=True,
            inputs=[
                io.Model.Input(
                    "model",
                    tooltip="The model to train on. LoRAs applied to it are part of the base. It is not modified.",
                ),
                io.Clip.Input(
                    "clip",
                    tooltip="The text encoder to sample with. Frozen, unless train_text_encoder is on in "
                    "DreamBooth Options.",
                ),
                io.Vae.Input("vae", tooltip="Encodes the photos and decodes the validation images."),
                SubjectType.Input("subject", tooltip="Photos and captions, from Load Subject Images."),
                setting_input("steps"),
                setting_input("learning_rate", step=1e-6, round=1e-8, zero=USUAL),
                setting_input("rank", zero=USUAL),
                setting_input("network_alpha", step=0.5, round=0.01, zero="the same as rank"),
                setting_input("train_batch_size"),
                setting_input("gradient_accumulation_steps"),
                setting_input("prior_loss_weight", step=0.05, round=0.001),
                setting_input("seed"),
                io.Int.Input(
                    "resolution",
                    default=0,
                    min=0,
                    max=4096,
                    step=8,
                    tooltip="Width and height of the training images in pixels. 0: use that of Load Subject Images.",
                ),
                setting_input("lr_scheduler"),
                setting_input("lr_warmup_steps"),
                setting_input("gradient_checkpointing"),
                setting_input("precision"),
                io.String.Input(
                    "output_name",
                    default="my_subject",
                    tooltip="File name of the LoRA in models/loras; subfolders are allowed (pets/rex). Files of other "
                    "runs, and files edited since, are never overwritten: _2, _3 ... is appended instead.",
                ),
                io.String.Input(
                    "validation_prompts",
                    multiline=True,
                    default="a photo of {subject}",
                    tooltip="One prompt per line, sampled during training. {subject} is replaced by the trained words. "
                    "Empty: no images.",
                ),
                setting_input("validation_interval"),
                io.Boolean.Input(
                    "force_retrain",
                    default=False,
                    tooltip="Train again from step 0, even if a run with the same inputs exists.",
                ),
                ClassPriorsType.Input(
                    "class_priors",
                    optional=True,
                    tooltip="Class images from Generate Class Priors. They stop the model from turning every dog into "
                    "yours. preservation tells how they are used.",
                ),
                DreamBoothOptionsType.Input(
                    "options", optional=True, tooltip="Advanced settings, from DreamBooth Options."
                ),
                # Optional, so that API prompts from before this input still validate.
                io.Combo.Input(
                    "after_stop",
                    options=list(AFTER_STOP),
                    default="keep",
                    optional=True,
                    tooltip="What to do with a run that was ended by Stop and keep. keep: its LoRA stays the result. "
                    "continue: resume training up to the planned steps.",
                ),
                io.Combo.Input(
                    "preservation",
                    options=list(WAYS),
                    default=DEFAULT_WAY,
                    optional=True,
                    tooltip=PRESERVATION_HELP,
                ),
                io.Int.Input(
                    "use_step",
                    default=0,
                    min=0,
                    max=1_000_000,
                    optional=True,
                    control_after_generate=False,
                    tooltip="Make this step the result, without training: one whose LoRA was kept (each "
                    "validation_interval, and the last). 0: the run's own result.",
                ),
                io.Combo.Input(
                    "preset",
                    options=[CUSTOM, *PRESETS],
                    default=CUSTOM,
                    optional=True,
                    tooltip=TOOLTIP,
                ),
            ],
            outputs=[
                SubjectLoraType.Output(display_name="subject_lora", tooltip="For Apply Subject LoRA."),
                io.String.Output(display_name="path", tooltip="Path of the LoRA file."),
                io.Image.Output(
                    display_name="validation",
                    tooltip="All validation images, in order of steps. Blocked if there are none.",
                ),
                io.LoraModel.Output(
                    display_name="lora_model", tooltip="For ComfyUI's own Load LoRA Model and Save LoRA Weights."
                ),
                io.LossMap.Output(
                    display_name="loss_map",
                    tooltip="For ComfyUI's own Plot Loss Graph. Blocked if there is nothing to plot.",
                ),
                io.Image.Output(
                    display_name="grid",
                    tooltip="All validation images as one labelled table, step by prompt. Blocked if there are none.",
                ),
            ],
            hidden=[io.Hidden.unique_id, io.Hidden.extra_pnginfo, io.Hidden.prompt],
        )
        return presented(schema, SHOWN, {"preset": {"presets": PRESETS}})

    @classmethod
    def validate_inputs(cls, output_name: str | None = None) -> bool | str:
        """Check the file name before anything runs.

        ComfyUI checks the numbers itself and names their inputs; an error from here is repeated for every argument.
        """
        try:
            if output_name is not None:
                checked_name(str(output_name))
        except SubjectBoothError as error:
            return str(error)
        return True

    @classmethod
    def fingerprint_inputs(
        cls,
        force_retrain: bool | None = False,
        after_stop: str | None = "keep",
        output_name: str | None = None,
        use_step: int | None = 0,
        **_: Any,
    ) -> float | str:
        """Bypass ComfyUI's cache for a forced run (NaN never equals itself) and if a published file changed or is gone.

        A new NaN each time: inside a tuple the same NaN object does count as equal, and `math.nan` is one object.
        """
        if force_retrain:
            return float("nan")
        replaced = published.replaced_files(output_name, use_step)
        return f"{live.generation(after_stop or '')} {published.lost_files(output_name)} {replaced}"

    @classmethod
    @graph_messages()
    def execute(
        cls,
        model: Any,
        clip: Any,
        vae: Any,
        subject: Subject,
        output_name: str,
        resolution: int,
        force_retrain: bool = False,
        class_priors: ClassPriors | None = None,
        options: dict[str, Any] | None = None,
        after_stop: str = "keep",
        preservation: str = DEFAULT_WAY,
        use_step: int = 0,
        preset: str = CUSTOM,
        **settings: Any,
    ) -> io.NodeOutput:
        """Train, or reuse the run, and return its result."""
        check_choice("after_stop", after_stop, AFTER_STOP)  # ComfyUI 0.3.75 does not validate V3 combos
        keeping = keeping_class(class_priors, subject.class_word, preservation)
        given = with_preset({**settings, **(options or {})}, preset)
        family = family_of(model)
        chosen = with_usual(given, family)
        config = config_from(chosen, resolution or subject.resolution)
        progress = Progress(cls.hidden.unique_id, config.steps)
        progress.set_text("reading the base model")
        with _training_mode():
            device = comfy.model_management.get_torch_device()
            files = model_files(cls.hidden.prompt, cls.hidden.unique_id)
            run = run_of(model, clip, vae, subject, config, keeping, device, files)
            resume = after_stop == "continue"
            if (force_retrain or resume) and run.folder.kept_step(config.steps) is not None:
                live.mark_kept_results_stale()
            done = 0 if force_retrain else run.folder.resumable_step(config.steps)
            with live.feed(place_of(cls.hidden), run, config.steps, device, done) as feed:
                finished, plan = follow(run.events(force_retrain, resume, use_step), progress, feed, output_name)
                file = publish(finished.path, loras_dirs()[0], output_name)
                published.remember(output_name, file.path, use_step)
                lora = load_lora_file(file.path)
                matched = require_all_keys(lora.tensors, model, clip)
                result = run.result
                assert result is not None  # its events were read to their end
                pictures, drifted = class_pictures_shown(
                    class_priors, lora, (model, clip, vae), run.folder.path, progress
                )
                shown = {**result_of(result, lora, matched), **pictures}
                run.writer.record_published(shown)
                own = cls.hidden.prompt, cls.hidden.unique_id
                keep_base_graph(run.folder.path, *own, run.guidance_scale, family.name)
                feed.end(end_state(run), shown)
        headline = summary(finished, run, lora, matched)
        validations, not_drawn = run.validations(run.trained_steps)
        remember_lora_folders(pack_output_dir(), loras_dirs())
        if finished.warning:
            log.warning("%s", finished.warning)
        warnings = notes_in_graph(run.warnings)
        for warning in warnings:
            log.warning("%s", warning)
        text = [
            headline,
            *([described(preset)] if preset != CUSTOM else []),
            *usual_line(given, chosen, family),
            *filter(
                None,
                [
                    finished.warning,
                    *warnings,
                    file.note,
                    drifted,
                    not_drawn_note(not_drawn),
                    over_limit_note(pack_output_dir()),
                ],
            ),
        ]
        # Without the plan, which would not fit into the space that the editor gives it.
        progress.set_text("\n".join(text))
        text += filter(None, [*ignored_patches(model), plan])
        return cls._output(run, lora, validations, text, {"run": run.folder.path.name, **shown})

    @classmethod
    def _output(
        cls,
        run: Run,
        lora: SubjectLora,
        validations: list[tuple[int, torch.Tensor]],
        text: list[str],
        result: dict[str, Any],
    ) -> io.NodeOutput:
        pictures = [
            view_entry(path)
            for step, _ in validations
            for path in run.folder.validation_paths(step, len(run.validation_prompts))
        ]
        images = torch.cat([images for _, images in validations]) if validations else ExecutionBlocker(None)
        losses = run.folder.losses(run.trained_steps)
        table = write_step_grid(run, validations)
        grid = as_image(table) if table is not None else ExecutionBlocker(None)
        # Plot Loss Graph divides by the spread of the losses.
        loss_map = {"loss": losses} if len(set(losses)) > 1 else ExecutionBlocker(None)
        return io.NodeOutput(
            lora,
            str(lora.path),
            images,
            lora.tensors,
            loss_map,
            grid,
            ui={"images": pictures, "text": text, "subjectbooth": [result]},
        )


@contextmanager
def _training_mode() -> Iterator[None]:
    """Leave ComfyUI's inference mode, in which nothing can be trained, and give all memory back afterwards."""
    try:
        with torch.inference_mode(False):
            yield
    finally:
        clean_up()
