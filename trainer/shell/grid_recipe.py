"""The recipes of a grid's runs. A base is loaded once for all runs that use it, and photos are read once."""

from __future__ import annotations

import argparse
import dataclasses
import sys
from collections.abc import Callable
from pathlib import Path

import torch

from ..base.base_model import BaseModel
from ..base.stored.stored_base import load_base, stored_resolution
from ..experiment.spec import DEMO_BASES
from ..files.storage import canonical_json
from ..machine.runtime import default_device
from ..runs.recipe import Recipe
from ..subject.subject import Subject
from .demo_parts import DEMO, demo_checkpoint, narrow_base
from .recipe import read_config, read_subject, with_preservation
from .terms import note_in_shell

NARROW_BASES = tuple(name for name in DEMO_BASES if name != DEMO)
"""The narrow model and its copies."""

DEMO_SIDE = 64
"""Pixels: the size of the demo base's images."""


class Recipes:
    """Makes recipes from options.

    Args:
        output_dir: for the demo base's checkpoint, if a recipe needs it.
        device: None for the GPU if there is one.
    """

    def __init__(self, output_dir: Path, device: torch.device | None = None) -> None:
        self._output, self._device = output_dir, device
        self._bases: dict[str, BaseModel] = {}
        self._subjects: dict[str, Subject] = {}

    def recipe(
        self,
        options: argparse.Namespace,
        warn: Callable[[str], None] = lambda text: print(text, file=sys.stderr),
    ) -> Recipe:
        """The recipe of a run, with its class images, which are made if they are missing.

        Args:
            options: from :func:`trainer.shell.grid_options.namespace`.
            warn: shows a warning.

        Raises:
            SubjectBoothError: an option, a photo or the base cannot be used.
        """
        config = read_config(options)
        if options.resolution is None:
            is_demo = str(options.base) in DEMO_BASES
            side = DEMO_SIDE if is_demo else stored_resolution(options.base, options.prediction_type)
            config = dataclasses.replace(config, resolution=side)
        subject = self._subject(options, config.resolution, warn)
        if config.masked_loss:
            subject.check_masks(config.resolution, buckets=config.enable_bucket)
        return with_preservation(Recipe(self._base(options), subject, config), options, self._device)

    def forget_photos(self) -> None:
        """Photos of earlier recipes are read again; of thousands of subjects, they would fill the memory."""
        self._subjects.clear()

    def _base(self, options: argparse.Namespace) -> BaseModel:
        key = f"{options.base} {options.clip_skip} {options.prediction_type}"
        if key not in self._bases:
            self._bases.clear()  # one at a time: a base may take gigabytes
            self._bases[key] = self._load(options)
        return self._bases[key]

    def _load(self, options: argparse.Namespace) -> BaseModel:
        if str(options.base) in NARROW_BASES:
            return narrow_base(str(options.base))
        path = demo_checkpoint(self._output / "base") if str(options.base) == DEMO else options.base
        return load_base(path, options.clip_skip, options.prediction_type, self._device or default_device())

    def _subject(self, options: argparse.Namespace, resolution: int, warn: Callable[[str], None]) -> Subject:
        """Read once, because the cache of prepared photos goes by the subject itself."""
        names = ("photos", "class_word", "token", "crop", "prompt_template", "captions")
        key = canonical_json([resolution, *(str(getattr(options, name)) for name in names)])
        if key not in self._subjects:
            self._subjects[key] = read_subject(options, resolution)
            for warning in self._subjects[key].warnings:
                warn(f"warning: {note_in_shell(warning)}")
        return self._subjects[key]
