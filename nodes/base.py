"""The base of a connected MODEL, CLIP and VAE, of whichever kind: the one place where nodes choose between them."""

from __future__ import annotations

from comfy.model_patcher import ModelPatcher
from comfy.sd import CLIP, VAE

from ..trainer.base.base_model import BaseModel
from .bridge import base_from_graph, check_wired
from .wired.base import check_wired_family, is_trained_as_wired, wired_base
from .wired.families import family_of


def base_of(model: ModelPatcher, clip: CLIP, vae: VAE) -> BaseModel:
    """The base that this graph would sample with. Loads nothing.

    Stable Diffusion (1.x, 2.x, SDXL) is trained through diffusers, every other family on the connected model itself.

    Raises:
        SubjectBoothError: the model cannot be trained on, or has patches that are not weights.
    """
    return wired_base(model, clip, vae) if is_trained_as_wired(model) else base_from_graph(model, clip, vae)


def check_base(model: ModelPatcher, clip: CLIP | None, vae: VAE | None) -> str:
    """Reject what :func:`base_of` would, before anything expensive; return the family's name otherwise.

    Raises:
        SubjectBoothError: the model cannot be trained on, or has patches that are not weights.
    """
    if not is_trained_as_wired(model):
        return check_wired(model, clip, vae).family.name
    check_wired_family(model, clip, vae)
    return family_of(model).name
