"""Class images before and after a training, from the same seeds, for DreamBoothLoRATrain to show."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import comfy.sd
import torch
from comfy.model_patcher import ModelPatcher
from comfy.sd import CLIP, VAE
from PIL import Image

from ..trainer.errors import SubjectBoothError
from ..trainer.files.labelled_grid import as_pictures
from ..trainer.files.storage import canonical_json, disk_errors, sha256_of, write_atomic
from ..trainer.measure.figures import drift
from ..trainer.preserve.priors import ClassPriors, PriorRecipe, batches_to_make
from .bridge import ComfyLatentCodec, base_digest, latent_factor
from .host import Progress, versioned_entry
from .lora_file import SubjectLora
from .picture_embedder import embedder_for
from .sampling import PictureSampler
from .weights import digest_of

SHOWN = 4
"""Pictures before and after: drawing them costs as much as about 40 training steps at the sampler's 20 steps."""

SIDE = 256
"""Largest width and height of a picture in the files."""

FOLDER = "class"

Report = Callable[[str, Image.Image | None], None]
"""Called after each denoising step with a status line and a rough image, if previews are on."""


@dataclass(frozen=True)
class ClassPictures:
    """Class images of the base, and those that the base with the LoRA draws from the same noise.

    Attributes:
        prompt: what both were drawn from.
        before, after: PNG files of :data:`SHOWN` pictures side by side.
        drift: see :func:`trainer.measure.figures.drift`; None without an embedding for this base.
    """

    prompt: str
    before: Path
    after: Path
    drift: float | None

    def as_result(self) -> dict[str, Any]:
        """For the panel and the run's ``result.json``."""
        return {
            "prompt": self.prompt,
            "before": versioned_entry(self.before),
            "after": versioned_entry(self.after),
            "drift": self.drift,
        }


def draw_class_pictures(
    priors: ClassPriors, lora: SubjectLora, model: ModelPatcher, clip: CLIP, vae: VAE, folder: Path, report: Report
) -> ClassPictures | None:
    """The first class images, and the same seeds with the LoRA. Pictures that exist are reused.

    Args:
        priors: the connected class images.
        lora: the trained LoRA.
        model, clip, vae: the base, without it.
        folder: the run's folder.
        report: raises to cancel.

    Returns:
        None if the class images were not drawn by :class:`GenerateClassPriors` on this base.

    Raises:
        SubjectBoothError: out of memory, or the files cannot be written.
        Cancelled: by ``report``.
    """
    recipe, numbers = priors.recipe, priors.numbers[:SHOWN]
    if recipe is None or recipe.base_digest != base_digest(model, clip):
        return None
    key = sha256_of(recipe.key, canonical_json(list(numbers)), lora.digest, digest_of(vae.patcher))[:16]
    about, before, after = (folder / FOLDER / f"{key}{end}" for end in (".json", "_before.png", "_after.png"))
    if (found := _read(about)) and before.is_file() and after.is_file():
        return ClassPictures(recipe.prompt, before, after, found["drift"])
    with torch.inference_mode():
        lora_model, lora_clip = comfy.sd.load_lora_for_models(model, clip, lora.tensors, 1.0, 1.0)
        latents = _sample(recipe, numbers, lora_model, lora_clip, latent_factor(vae), report)
        codec = ComfyLatentCodec(model, vae)
        images = [codec.decode(part) for part in (priors.latents[: len(numbers)], latents)]
        moved = _drift_of(images, model)
    with disk_errors("the pictures of the class cannot be saved", folder):
        for path, pictures in zip((before, after), images, strict=True):
            write_atomic(path, partial(_side_by_side(pictures).save, format="PNG"))
        write_atomic(about, canonical_json({"prompt": recipe.prompt, "drift": moved}))
    return ClassPictures(recipe.prompt, before, after, moved)


def class_pictures_shown(
    priors: ClassPriors | None,
    lora: SubjectLora,
    base: tuple[ModelPatcher, CLIP, VAE],
    folder: Path,
    progress: Progress,
) -> tuple[dict[str, Any], str]:
    """What the trainer's node adds to its result, and a line for its text; both empty without class images.

    The training is over and its LoRA is published: pictures that cannot be had are a note, not an error.
    """
    if priors is None:
        return {}, ""
    try:
        found = draw_class_pictures(priors, lora, *base, folder, progress.show)
    except SubjectBoothError as error:
        return {}, f"class images after the training could not be drawn: {error}"
    if found is None:
        return {}, ""
    moved = "" if found.drift is None else f"class drift {found.drift:.2f} (0: unchanged, 1: another random picture)"
    return {"class": found.as_result()}, moved


def _sample(
    recipe: PriorRecipe, numbers: tuple[int, ...], model: ModelPatcher, clip: CLIP, latent_factor: int, report: Report
) -> torch.Tensor:
    """Latents float32 [n, c, h, w] of these class images, drawn by another model."""
    sampler = PictureSampler.of_recipe(
        model, clip, recipe, pictures="pictures of the class", latent_factor=latent_factor
    )
    others = [number for number in range(max(numbers) + 1) if number not in numbers]
    # One at a time, as memory was planned for nothing more, unless an image depends on its batch.
    batches = batches_to_make(others, max(numbers) + 1, 1, recipe.grouping)
    found: dict[int, torch.Tensor] = {}

    def on_step(step: int, total: int, preview: Image.Image | None) -> None:
        report(f"the class after training: picture {len(found) + 1} of {len(numbers)}, step {step}/{total}", preview)

    for batch in batches:
        drawn = sampler.sample([recipe.seed_of(number) for number in batch], on_step)
        found |= {number: latents for number, latents in zip(batch, drawn, strict=True) if number in numbers}
    return torch.stack([found[number] for number in numbers])


def _drift_of(images: list[torch.Tensor], model: ModelPatcher) -> float | None:
    """Of the class alone; None without an embedder, or with a single picture, which has no other seed."""
    embedder, _ = embedder_for(None, model)
    if embedder is None or len(images[0]) < 2:
        return None
    before, after = (embedder.embed(pictures)[None] for pictures in images)
    return float(drift(before, after).mean())


def _side_by_side(images: torch.Tensor) -> Image.Image:
    """float32 [n, 3, h, w] in 0..1, scaled down to :data:`SIDE`."""
    pictures = as_pictures(images.movedim(1, -1))
    for picture in pictures:
        picture.thumbnail((SIDE, SIDE), Image.Resampling.LANCZOS)
    width, height = pictures[0].size
    gap = max(2, width // 64)
    sheet = Image.new("RGB", (len(pictures) * (width + gap) - gap, height))
    for number, picture in enumerate(pictures):
        sheet.paste(picture, (number * (width + gap), 0))
    return sheet


def _read(path: Path) -> dict[str, Any] | None:
    try:
        values = json.loads(path.read_bytes())
    except (OSError, ValueError):
        return None
    return values if isinstance(values, dict) and "drift" in values else None
