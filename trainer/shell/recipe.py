"""Builds the recipe of a run from command-line options: settings, photos, base and class images."""

from __future__ import annotations

import argparse
import dataclasses
import sys
from collections.abc import Sequence
from pathlib import Path

import torch

from ..base.sd.families import FAMILIES
from ..base.sd.tokenizer import tokenize
from ..base.stored.stored_base import load_base, stored_resolution
from ..config import TrainConfig
from ..errors import SubjectBoothError
from ..files.storage import user_path
from ..machine.processes import current
from ..machine.runtime import choose_precision, default_device
from ..preserve.generate import generate
from ..preserve.preservation import Preservation
from ..preserve.priors import ClassPriors
from ..preserve.ways import keeping_class, uses_class_images
from ..runs.publish import check_folder, checked_name
from ..runs.recipe import Recipe
from ..subject.photo_files import read_photos
from ..subject.photos import list_photos
from ..subject.subject import Subject, caption_lines, make_subject


def read_recipe(options: argparse.Namespace, device: torch.device | None) -> Recipe:
    """Check the options, read the photos and load the base. Class images are not generated yet.

    Raises:
        SubjectBoothError: an option, a photo or the base is invalid.
    """
    config = read_config(options)
    if not options.num_class_images:
        keeping_class(None, options.class_word, options.preservation)  # before the base is loaded
    elif not uses_class_images(options.preservation):
        print(f"warning: --preservation {options.preservation} uses no class images; none are made", file=sys.stderr)
    if options.resolution is None:
        config = dataclasses.replace(config, resolution=stored_resolution(options.base, options.prediction_type))
    subject = read_subject(options, config.resolution)
    for warning in subject.warnings:
        print(f"warning: {warning}", file=sys.stderr)
    if any(photo.caption != subject.instance_prompt for photo in subject.photos):
        print("\n".join(["captions:", *caption_lines(subject)]))
    if config.masked_loss:
        subject.check_masks(config.resolution, buckets=config.enable_bucket)  # before the base is loaded
    base = load_base(options.base, options.clip_skip, options.prediction_type, device or default_device())
    return Recipe(base, subject, config)


def read_config(options: argparse.Namespace) -> TrainConfig:
    """Read the settings. A missing resolution is that of the first model family, until the base is known.

    Raises:
        SubjectBoothError: an option is out of range.
    """
    settings = {setting.name: getattr(options, setting.name) for setting in dataclasses.fields(TrainConfig)}
    if options.resolution is None:
        settings["resolution"] = FAMILIES[0].default_resolution[0]
    config = TrainConfig.from_json(settings)
    if not 1 <= options.class_guidance_scale <= 100:
        raise SubjectBoothError(
            f"class_guidance_scale {options.class_guidance_scale:g}",
            "a number from 1 to 100",
            "use 7, the usual value, or 1 for no guidance",
            "class_guidance_scale",
        )
    if options.num_class_images < 0:
        raise SubjectBoothError(
            f"num_class_images {options.num_class_images}",
            "0 or more",
            "use 100 to 200 for good class preservation, or 0 for none",
            "num_class_images",
        )
    checked_name(options.output_name)
    return _with_batch_of_all(config)


def _with_batch_of_all(config: TrainConfig) -> TrainConfig:
    """Each process adds its own batch. The run is that of one process with all of them."""
    count = current().count
    if count == 1:
        return config
    try:
        return dataclasses.replace(config, train_batch_size=config.train_batch_size * count)
    except SubjectBoothError as error:
        raise SubjectBoothError(
            f"train_batch_size {config.train_batch_size} in each of {count} processes",
            f"together {error.needed}",
            "lower train_batch_size or start fewer processes",
            "train_batch_size",
        ) from None


def read_subject(options: argparse.Namespace, resolution: int) -> Subject:
    """Read the photos with their captions, as a subject.

    Args:
        options: ``photos`` is a folder, or a list of files and folders.

    Raises:
        SubjectBoothError: a photo, a caption or an option is invalid.
    """
    photos, notes = read_photos(photo_paths(options.photos), options.captions)
    return make_subject(
        photos,
        class_word=options.class_word,
        token=options.token,
        resolution=resolution,
        crop=options.crop,
        prompt_template=options.prompt_template,
        tokenize=tokenize,
        notes=notes,
    )


def photo_paths(photos: str | Path | Sequence[str]) -> list[Path]:
    """The photos in a folder, or the given files and those in the given folders.

    Raises:
        SubjectBoothError: a folder is missing or has no images.
    """
    found: list[Path] = []
    for part in [photos] if isinstance(photos, (str, Path)) else photos:
        path = user_path(str(part))
        found += [path] if path.is_file() else list_photos(path)
    return found


def with_preservation(recipe: Recipe, options: argparse.Namespace, device: torch.device | None) -> Recipe:
    """Add the method of class preservation to the recipe; missing class images are generated.

    Raises:
        SubjectBoothError: training would fail, or class images cannot be generated or saved.
    """
    priors = _class_images(recipe, options, device) if _wants_class_images(options) else None
    return dataclasses.replace(recipe, preservation=_keeping_class(priors, recipe, options))


def with_planned_preservation(recipe: Recipe, options: argparse.Namespace) -> Recipe:
    """As :func:`with_preservation`, with a placeholder for class images, to plan their memory before they exist."""
    size = recipe.base.denoiser.latent_size(recipe.config.resolution, recipe.config.resolution)
    planned = ClassPriors(torch.zeros(1, *size), recipe.subject.class_prompt, ("",), "")
    priors = planned if _wants_class_images(options) else None
    return dataclasses.replace(recipe, preservation=_keeping_class(priors, recipe, options))


def _wants_class_images(options: argparse.Namespace) -> bool:
    return bool(options.num_class_images) and uses_class_images(options.preservation)


def _keeping_class(priors: ClassPriors | None, recipe: Recipe, options: argparse.Namespace) -> Preservation:
    return keeping_class(priors, recipe.subject.class_word, options.preservation)


def _class_images(recipe: Recipe, options: argparse.Namespace, device: torch.device | None) -> ClassPriors:
    from tqdm import tqdm

    class_prompt = recipe.subject.class_prompt

    def check() -> None:
        if current().is_main:
            check_folder(options.output_dir, options.output_name)
        recipe.run(options.output_dir / "runs", device).check(class_prompt)

    target = device or default_device()
    precision, _ = choose_precision(recipe.config, target)
    with tqdm(total=options.num_class_images, unit="class image", disable=not current().is_main) as bar:
        for made in generate(
            recipe.base,
            class_prompt,
            options.num_class_images,
            recipe.config.resolution,
            options.output_dir / "class_images",
            target,
            check,
            precision=precision,
            guidance_scale=options.class_guidance_scale,
        ):
            if isinstance(made, ClassPriors):
                return made
            bar.update(made - bar.n)
    raise AssertionError("generate always ends with the class priors")
