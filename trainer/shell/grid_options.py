"""What a grid can vary: the options of a training."""

from __future__ import annotations

import argparse
from collections.abc import Mapping
from functools import cache
from pathlib import Path
from typing import Any

from ..config import TrainConfig
from ..errors import SubjectBoothError
from ..experiment.names import Option
from ..experiment.spec import DEMO_BASES
from ..files.storage import user_path
from ..preserve.ways import keeping_class
from ..subject.captions import check_template
from ..subject.trigger import DEFAULT_TOKEN, check_word
from .options import parser
from .recipe import photo_paths, read_config

FIXED = ("help", "output_dir", "output_name", "force_retrain", "after_stop", "use_step", "report_to", "plan", "cpu")
"""Options that a grid sets itself."""

REQUIRED = ("base", "photos", "class_word")


@cache
def options() -> Mapping[str, Option]:
    """What can be set and varied, by name."""
    found = {}
    for action in parser()._actions:
        if action.dest in FIXED:
            continue
        kind = bool if action.nargs == 0 else action.type if action.type in (int, float) else str
        many = action.nargs == "*" or action.dest == "photos"
        found[action.dest] = Option(action.dest, kind, tuple(action.choices or ()), many)  # type: ignore[arg-type]
    return found


@cache
def defaults() -> Mapping[str, Any]:
    """The options' defaults, as JSON values."""
    return {action.dest: action.default for action in parser()._actions if action.dest in options()}


def namespace(values: Mapping[str, Any], steps: int, output_dir: Path) -> argparse.Namespace:
    """The options of a run as if they came from the command line."""
    fixed = {action.dest: action.default for action in parser()._actions if action.dest in FIXED}
    given = {**fixed, **values, "steps": steps, "base": user_path(values["base"]), "output_dir": output_dir}
    return argparse.Namespace(**given)


def check_options(values: Mapping[str, Any]) -> TrainConfig:
    """Check the options of a run, without reading photos or the base; returns its settings.

    Raises:
        SubjectBoothError: an option is missing, out of range, or names a file that does not exist.
    """
    for name in REQUIRED:
        if not values[name]:
            raise SubjectBoothError(f"{name} is not set", "a value", f"add {name} to [settings] or [axes]", name)
    config = read_config(namespace(values, values["steps"], Path()))
    base = user_path(values["base"])
    if values["base"] not in DEMO_BASES and not base.exists():
        named = " or ".join(f'"{name}"' for name in DEMO_BASES)
        raise SubjectBoothError(
            f"the base {values['base']!r} does not exist", f"a checkpoint, a folder, or {named}", "correct it", "base"
        )
    photo_paths(values["photos"])
    check_word(values["class_word"], "class_word", "dog")
    check_word(values["token"], "token", DEFAULT_TOKEN)
    check_template(values["prompt_template"], needs_token=True)
    if not values["num_class_images"]:
        keeping_class(None, values["class_word"], values["preservation"])
    return config
