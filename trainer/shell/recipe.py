"""The recipe of a run from the options of a command: settings, photos, base and class images."""

from __future__ import annotations

import argparse
import dataclasses
import os
import sys

import torch

from ..base.sd.families import FAMILIES
from ..base.sd.tokenizer import tokenize
from ..base.stored.stored_base import load_base, stored_resolution
from ..config import TrainConfig
from ..errors import SubjectBoothError
from ..machine.runtime import choose_precision, default_device
from ..preserve.generate import generate
from ..preserve.priors import ClassPriors
from ..preserve.ways import keeping_class
from ..runs.publish import check_folder, checked_name
from ..runs.recipe import Recipe
from ..subject.photo_files import read_photos
from ..subject.photos import list_photos
from ..subject.subject import Subject, caption_lines, make_subject


def read_recipe(options: argparse.Namespace, device: torch.device | None) -> Recipe:
    """Check the options, read the photos and load the base. Class images are not made yet.

    Raises:
        SubjectBoothError: an option, a photo or the base cannot be used.
    """
    config = read_config(options)
    if options.resolution is None:
        config = dataclasses.replace(config, resolution=stored_resolution(options.base, options.prediction_type))
    subject = read_subject(options, config.resolution)
    for warning in subject.warnings:
        print(f"warning: {warning}", file=sys.stderr)
    if any(photo.caption != subject.instance_prompt for photo in subject.photos):
        print("\n".join(["captions:", *caption_lines(subject)]))
    if config.masked_loss:
        subject.check_masks(config.resolution, buckets=config.enable_bucket)  # before the base is read
    base = load_base(options.base, options.clip_skip, options.prediction_type, device or default_device())
    return Recipe(base, subject, config)


def read_config(options: argparse.Namespace) -> TrainConfig:
    """The settings; a resolution that is not given is that of the first family, until the base says its own.

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
            "7 is usual, 1 draws without guidance",
            "class_guidance_scale",
        )
    if options.num_class_images < 0:
        raise SubjectBoothError(
            f"num_class_images {options.num_class_images}",
            "0 or more",
            "100 to 200 keep a class well, 0 makes none",
            "num_class_images",
        )
    processes = int(os.environ.get("WORLD_SIZE", "1"))
    if processes > 1:
        # The step itself shares its batch between processes; who writes the run's files is not settled yet.
        raise SubjectBoothError(
            f"{processes} processes", "one", "use accelerate launch --num_processes 1", "accelerate launch"
        )
    checked_name(options.output_name)
    return config


def read_subject(options: argparse.Namespace, resolution: int) -> Subject:
    """The photos of a folder as a subject."""
    photos, notes = read_photos(list_photos(options.photos), options.captions)
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


def with_class_images(recipe: Recipe, options: argparse.Namespace, device: torch.device | None) -> Recipe:
    """The recipe with the class images that the options ask for, if any; those that are missing are drawn.

    Raises:
        SubjectBoothError: the training would be refused, or they cannot be drawn or kept.
    """
    if not options.num_class_images:
        return recipe
    return dataclasses.replace(recipe, preservation=keeping_class(_class_images(recipe, options, device)))


def with_planned_class_images(recipe: Recipe, options: argparse.Namespace) -> Recipe:
    """The recipe with a stand-in for its class images, to count their memory before there are any."""
    if not options.num_class_images:
        return recipe
    size = recipe.base.denoiser.latent_size(recipe.config.resolution, recipe.config.resolution)
    priors = ClassPriors(torch.zeros(1, *size), recipe.subject.class_prompt, ("",), "")
    return dataclasses.replace(recipe, preservation=keeping_class(priors))


def _class_images(recipe: Recipe, options: argparse.Namespace, device: torch.device | None) -> ClassPriors:
    from tqdm import tqdm

    class_prompt = recipe.subject.class_prompt

    def check() -> None:
        check_folder(options.output_dir, options.output_name)
        recipe.run(options.output_dir / "runs", device).check(class_prompt)

    target = device or default_device()
    precision, _ = choose_precision(recipe.config, target)
    with tqdm(total=options.num_class_images, unit="class image") as bar:
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
