"""The base of a connected MODEL, CLIP and VAE, of whichever kind: the one place where nodes choose between them."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

import comfy.model_management
import torch
from comfy.model_patcher import ModelPatcher
from comfy.sd import CLIP, VAE

from ..trainer.base.base_model import BaseModel
from ..trainer.config import TrainConfig
from ..trainer.preserve.preservation import Preservation
from ..trainer.runs.recipe import Recipe
from ..trainer.runs.run import Run
from ..trainer.subject.subject import Subject
from .bridge import base_from_graph
from .host import pack_output_dir
from .wired.base import check_wired_family, is_fp8, is_stable_diffusion, wired_base
from .wired.distilled import distilled_note
from .wired.families import family_of


def base_of(
    model: ModelPatcher, clip: CLIP, vae: VAE, trains_text: bool = False, files: Sequence[str] = ()
) -> BaseModel:
    """The base that this graph would sample with. Loads nothing.

    Args:
        trains_text: whether a text encoder is trained too. That is possible for Stable Diffusion (1.x, 2.x, SDXL), on
            a copy of the connected models through diffusers and transformers. Otherwise, the connected model itself
            is trained on.
        files: names of the files that MODEL is loaded from.

    Raises:
        SubjectBoothError: the model cannot be trained on, or has patches that are not weights.
    """
    is_copied = trains_text and _can_be_copied(model)
    base = base_from_graph(model, clip, vae) if is_copied else wired_base(model, clip, vae)
    distilled = distilled_note(family_of(model), model.model.model_config.unet_config, files)
    return replace(base, note=". ".join(filter(None, (base.note, distilled))))


def _can_be_copied(model: ModelPatcher) -> bool:
    return is_stable_diffusion(model) and not is_fp8(model)


def run_of(
    model: ModelPatcher,
    clip: CLIP,
    vae: VAE,
    subject: Subject,
    config: TrainConfig,
    preservation: Preservation,
    device: torch.device,
    files: Sequence[str] = (),
) -> Run:
    """The run of these inputs in the pack's output folder.

    Earlier versions trained Stable Diffusion on a copy. A run that they began, or ended, is found again and goes on
    there, to the same bits.

    Args:
        files: names of the files that MODEL is loaded from.

    Raises:
        SubjectBoothError: see :func:`base_of`, or the inputs are not compatible.
    """

    def run_on(base: BaseModel) -> Run:
        recipe = Recipe(base, subject, config, preservation)
        return recipe.run(pack_output_dir(), device, comfy.model_management.get_free_memory)

    run = run_on(base_of(model, clip, vae, config.train_text_encoder, files))
    if not run.folder.path.exists() and _can_be_copied(model):
        before = run_on(base_from_graph(model, clip, vae))
        if before.folder.path.exists():
            return before
    return run


def check_base(model: ModelPatcher, clip: CLIP | None, vae: VAE | None) -> str:
    """Reject what :func:`base_of` would, before anything expensive; return the family's name otherwise.

    Raises:
        SubjectBoothError: the model cannot be trained on, or has patches that are not weights.
    """
    layout = check_wired_family(model, clip, vae)
    return layout.family.name if layout else family_of(model).name
