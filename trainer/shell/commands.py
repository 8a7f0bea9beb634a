"""The commands of the shell, by the first argument."""

from __future__ import annotations

import difflib
import sys
from collections.abc import Callable, Sequence

from ..errors import SubjectBoothError
from ..machine.processes import launched
from . import batch, clean, evaluate, experiment, inspect_lora, plan, speed, train
from .terms import error_in_shell

COMMANDS: dict[str, tuple[Callable[[Sequence[str]], int], str]] = {
    "train": (train.main, "trains a LoRA; the default if the first argument is an option"),
    "plan": (plan.main, "shows the memory plan of a training, without training"),
    "inspect": (inspect_lora.main, "shows what is in a LoRA file"),
    "evaluate": (evaluate.main, "measures what a LoRA does to its base"),
    "speed": (speed.main, "measures training steps with each setting that affects their speed"),
    "experiment": (experiment.main, "trains and measures a grid of runs, and writes a page about it"),
    "batch": (batch.main, "trains a LoRA for each of many subjects, on one GPU or a Ray cluster"),
    "clean": (clean.main, "lists old runs and class images, and removes them with --yes"),
}
"""What is called with the other arguments and returns the exit code, and what it does, for ``--help``."""


def run(arguments: Sequence[str]) -> int:
    """Run a command; returns the exit code."""
    first = arguments[0] if arguments else "--help"
    if first in ("-h", "--help"):
        print(overview())
        return 0 if arguments else 2
    if first.startswith("-"):  # the options of a training
        return train.main(arguments)
    if launched() > 1 and first in COMMANDS and first != "train":
        print(error_in_shell(_alone(first)), file=sys.stderr)
        return 2
    if first not in COMMANDS:
        print(error_in_shell(_unknown(first)), file=sys.stderr)
        return 2
    return COMMANDS[first][0](arguments[1:])


def overview() -> str:
    """The help without a command."""
    width = max(map(len, COMMANDS))
    return "\n".join(
        [
            "python -m trainer <command> ...",
            "python -m trainer --base model.safetensors --photos folder --class_word dog",
            "",
            "DreamBooth as LoRA on a Stable Diffusion checkpoint (1.x, 2.x, SDXL). Commands:",
            *(f"  {name:{width}}  {what}" for name, (_, what) in COMMANDS.items()),
            "",
            "python -m trainer <command> --help lists the options of a command.",
        ]
    )


def _alone(name: str) -> SubjectBoothError:
    return SubjectBoothError(
        f"{name} was started in {launched()} processes",
        "one process for every command but train",
        f"run python -m trainer {name} ... without accelerate launch",
        "accelerate launch",
    )


def _unknown(name: str) -> SubjectBoothError:
    near = difflib.get_close_matches(name, COMMANDS, 1)
    todo = f"use {near[0]}" if near else "see python -m trainer --help"
    return SubjectBoothError(f"there is no command {name[:60]!r}", f"one of {', '.join(COMMANDS)}", todo)
