"""The options of a training from a shell."""

from __future__ import annotations

import argparse
import dataclasses
from pathlib import Path

from ..base.sd.schedule import PREDICTION_TYPES
from ..config import TrainConfig
from ..files.storage import user_path
from ..preserve.ways import DEFAULT_WAY, PRESERVATION_HELP, WAYS
from ..subject.captions import DEFAULT_TEMPLATE
from ..subject.crops import CROPS
from ..subject.photo_files import CAPTIONS
from ..subject.trigger import DEFAULT_TOKEN
from .trackers import TRACKERS

LATEST = "latest"
"""The value of --use_step for the steps that are done so far."""


def parser() -> argparse.ArgumentParser:
    """The argument parser: all settings under their own names, and options for what a graph would connect."""
    options = argparse.ArgumentParser(
        prog="python -m trainer train",
        description="DreamBooth as LoRA on a Stable Diffusion checkpoint (1.x, 2.x, SDXL). "
        "The word train can be left out.",
        formatter_class=argparse.ArgumentDefaultsHelpFormatter,
    )
    add_base_options(options)
    options.add_argument(
        "--photos", type=user_path, required=True, help="Folder with photos of the subject; 3 to 5 are enough."
    )
    options.add_argument("--class_word", "--class-word", required=True, help='The kind of thing it is, such as "dog".')
    options.add_argument("--token", default=DEFAULT_TOKEN, help="The rare token that comes to stand for the subject.")
    options.add_argument("--prompt_template", default=DEFAULT_TEMPLATE, help="Caption for each photo.")
    options.add_argument(
        "--captions",
        default="auto",
        choices=CAPTIONS,
        help="Captions of the photos. auto: photo.txt next to photo.jpg if it exists, otherwise the template. "
        "files: every photo must have one. template: --prompt_template for all.",
    )
    options.add_argument("--crop", default="center", choices=CROPS, help="How photos are cropped to a square.")
    options.add_argument("--preservation", default=DEFAULT_WAY, choices=tuple(WAYS), help=PRESERVATION_HELP)
    options.add_argument(
        "--num_class_images",
        type=int,
        default=0,
        help="Number of class images for --preservation; existing ones are reused. 0: none.",
    )
    options.add_argument(
        "--class_guidance_scale",
        type=float,
        default=7.0,
        help="Classifier-free guidance scale for class images. Low values, 1 to 3, keep the class closer to the base's "
        "own distribution.",
    )
    options.add_argument(
        "--output_dir",
        type=user_path,
        default=Path("subjectbooth_output"),
        help="Folder for the LoRA; runs are saved in it as well.",
    )
    options.add_argument("--output_name", default="my_subject", help="File name of the LoRA.")
    options.add_argument("--force_retrain", action="store_true", help="Train again from step 0.")
    options.add_argument(
        "--after_stop",
        default="keep",
        choices=("keep", "continue"),
        help="What to do with a run that was stopped and kept. keep: its LoRA stays the result. continue: resume "
        "training up to the planned steps.",
    )
    options.add_argument(
        "--use_step",
        type=_step,
        default=0,
        metavar="STEP",
        help="Make a step whose LoRA was kept (one for each --validation_interval) the result, without training. "
        "latest: the progress of a stopped run (such as by Ctrl+C); a run without any first does one step. 0: the "
        "result of the run itself.",
    )
    options.add_argument(
        "--report_to",
        default="none",
        choices=TRACKERS,
        help="Also log settings, curves and validation images to TensorBoard (files in the run's folder) or to "
        "Weights & Biases (uploaded to its servers, including prompts, unless WANDB_MODE=offline). Needs the package "
        "tensorboard, or wandb 0.19 or newer.",
    )
    options.add_argument(
        "--plan",
        action="store_true",
        help="Show the memory plan and the settings that would be chosen, without training.",
    )
    options.add_argument("--cpu", action="store_true", help="Train on the CPU even if there is a GPU.")
    for setting in dataclasses.fields(TrainConfig):
        if setting.name == "validation_prompts":
            options.add_argument("--validation_prompts", nargs="*", default=[], help=setting.metadata["help"])
            continue
        if setting.name == "resolution":
            options.add_argument(
                "--resolution",
                type=int,
                help=f"{setting.metadata['help']} Default: the native size of the base, 512, 768 or 1024.",
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


def add_base_options(options: argparse.ArgumentParser) -> None:
    """Add the options of the base and how it is read."""
    options.add_argument(
        "--base", type=user_path, required=True, help="Checkpoint (.safetensors), or a folder in diffusers' format."
    )
    options.add_argument(
        "--clip_skip",
        type=int,
        choices=(1, 2),
        help="Text encoder layer, counted from the end. Default: that of the model family.",
    )
    options.add_argument(
        "--prediction_type",
        choices=PREDICTION_TYPES,
        help="For a checkpoint that does not contain its prediction type. Default: epsilon.",
    )


def _step(text: str) -> int | str:
    """A step, or :data:`LATEST`."""
    if text != LATEST and not (text.isascii() and text.isdigit()):
        raise argparse.ArgumentTypeError(f"{text!r} is neither a step (0 or more) nor {LATEST}")
    return text if text == LATEST else int(text)
