"""The base of a connected MODEL, CLIP and VAE, of whichever kind: the one place where nodes choose between them."""

from __future__ import annotations

from comfy.model_patcher import ModelPatcher
from comfy.sd import CLIP, VAE

from ..trainer.base.base_model import BaseModel
from .bridge import base_from_graph
from .wired.base import check_wired_family, is_fp8, is_stable_diffusion, wired_base
from .wired.families import family_of


def base_of(model: ModelPatcher, clip: CLIP, vae: VAE, trains_text: bool = False) -> BaseModel:
    """The base that this graph would sample with. Loads nothing.

    Args:
        trains_text: whether a text encoder is trained too. That is possible for Stable Diffusion (1.x, 2.x, SDXL), on
            a copy of the connected models through diffusers and transformers. Otherwise, the connected model itself
            is trained on.

    Raises:
        SubjectBoothError: the model cannot be trained on, or has patches that are not weights.
    """
    is_copied = trains_text and is_stable_diffusion(model) and not is_fp8(model)
    return base_from_graph(model, clip, vae) if is_copied else wired_base(model, clip, vae)


def check_base(model: ModelPatcher, clip: CLIP | None, vae: VAE | None) -> str:
    """Reject what :func:`base_of` would, before anything expensive; return the family's name otherwise.

    Raises:
        SubjectBoothError: the model cannot be trained on, or has patches that are not weights.
    """
    layout = check_wired_family(model, clip, vae)
    return layout.family.name if layout else family_of(model).name
