"""The options of a training from a shell."""

from __future__ import annotations

import argparse
import dataclasses
from pathlib import Path

from ..base.sd.schedule import PREDICTION_TYPES
from ..config import TrainConfig
from ..files.storage import user_path
from ..subject.captions import DEFAULT_TEMPLATE
from ..subject.crops import CROPS
from ..subject.photo_files import CAPTIONS
from ..subject.trigger import DEFAULT_TOKEN
from .trackers import TRACKERS


def parser() -> argparse.ArgumentParser:
    """The options: the trainer's settings under their own names, and what a graph would wire."""
    options = argparse.ArgumentParser(
        prog="python -m trainer",
        description="DreamBooth as LoRA on a Stable Diffusion checkpoint (1.x, 2.x, SDXL).",
        formatter_class=argparse.ArgumentDefaultsHelpFormatter,
    )
    options.add_argument(
        "--base", type=user_path, required=True, help="Checkpoint (.safetensors), or a folder as diffusers saves it."
    )
    options.add_argument("--photos", type=user_path, required=True, help="Folder with 3 to 5 photos of the subject.")
    options.add_argument("--class_word", "--class-word", required=True, help="What the subject is one of: dog.")
    options.add_argument("--token", default=DEFAULT_TOKEN, help="The word that is to mean the subject.")
    options.add_argument("--prompt_template", default=DEFAULT_TEMPLATE, help="What each photo is said to show.")
    options.add_argument(
        "--captions",
        default="auto",
        choices=CAPTIONS,
        help="Captions of the photos. auto: photo.txt next to photo.jpg where there is one, else the "
        "template. files: one for every photo. template: --prompt_template for all.",
    )
    options.add_argument("--crop", default="center", choices=CROPS, help="How photos become square.")
    options.add_argument(
        "--num_class_images",
        type=int,
        default=0,
        help="Class images to make (or find again) for class preservation. 0: none.",
    )
    options.add_argument(
        "--class_guidance_scale",
        type=float,
        default=7.0,
        help="Classifier-free guidance of the class images. Low, 1 to 3, keeps the class closer to "
        "what the base draws.",
    )
    options.add_argument(
        "--clip_skip", type=int, choices=(1, 2), help="Text encoder layer, from the end; the family's own without it."
    )
    options.add_argument(
        "--prediction_type",
        choices=PREDICTION_TYPES,
        help="For a checkpoint that does not say it itself; epsilon without it.",
    )
    options.add_argument(
        "--output_dir",
        type=user_path,
        default=Path("subjectbooth_output"),
        help="Gets the LoRA, and the runs beside it.",
    )
    options.add_argument("--output_name", default="my_subject", help="Name of the LoRA file.")
    options.add_argument("--force_retrain", action="store_true", help="Train again from step 0.")
    options.add_argument(
        "--after_stop",
        default="keep",
        choices=("keep", "continue"),
        help="What becomes of a run that was stopped and kept: its adapter stays the result, or it is "
        "trained on to all steps.",
    )
    options.add_argument(
        "--keep",
        action="store_true",
        help="Take what the run has learned so far (after Ctrl+C, say) for its result: it ends at its next step.",
    )
    options.add_argument(
        "--report_to",
        default="none",
        choices=TRACKERS,
        help="Also show settings, curves and validation pictures in TensorBoard (files in the run's "
        "folder) or Weights & Biases (its servers get them, prompts included, unless "
        "WANDB_MODE=offline). Needs the package tensorboard, or wandb 0.19 or newer.",
    )
    options.add_argument(
        "--plan",
        action="store_true",
        help="Say what would be in memory and which settings would be chosen, and train nothing.",
    )
    options.add_argument("--cpu", action="store_true", help="Train on the CPU even when there is a GPU.")
    for setting in dataclasses.fields(TrainConfig):
        if setting.name == "validation_prompts":
            options.add_argument("--validation_prompts", nargs="*", default=[], help=setting.metadata["help"])
            continue
        if setting.name == "resolution":
            options.add_argument(
                "--resolution",
                type=int,
                help=f"{setting.metadata['help']} Without it, what the base was trained at: 512, 768 or 1024.",
            )
            continue
        if isinstance(setting.default, bool):
            options.add_argument(f"--{setting.name}", action="store_true", help=setting.metadata["help"])
            continue
        options.add_argument(
            f"--{setting.name}",
            type=type(setting.default),
            default=setting.default,
            choices=setting.metadata["choices"] or None,
            help=setting.metadata["help"].replace("%", "%%"),
        )
    return options
