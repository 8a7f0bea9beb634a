"""The base of a connected MODEL that is trained as it is, of any family."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from comfy.ldm.modules.diffusionmodules.openaimodel import UNetModel
from comfy.model_patcher import ModelPatcher
from comfy.sd import CLIP, VAE

from ...trainer.base.base_model import BaseModel
from ...trainer.base.conditioning import Conditioning
from ...trainer.base.sd.denoiser import DiffusersUNet
from ...trainer.base.sd.layout import LdmLayout
from ...trainer.base.sd.schedule import make_noise_scheduler
from ...trainer.errors import SubjectBoothError
from ...trainer.files.storage import canonical_json, sha256_of
from ..bridge import ComfyLatentCodec, base_digest, check_parts, check_wired, latent_factor, literal_prompt
from ..noise import noise_schedule
from ..weights import stored_as
from ..wired_checks import UNET_PREFIX
from .conditioning import WiredConditioning, WiredPrompt
from .denoiser import WiredDenoiser
from .families import family_of


def is_stable_diffusion(model: ModelPatcher) -> bool:
    """Whether it has the UNet of Stable Diffusion 1.x, 2.x and SDXL."""
    return isinstance(model.model.diffusion_model, UNetModel)


def is_fp8(model: ModelPatcher) -> bool:
    """Whether weights of the model are used from fp8, as the loaders' ``weight_dtype`` keeps them."""
    return any(kind.startswith("float8") for kind in stored_as(model, UNET_PREFIX).values())


def wired_base(model: ModelPatcher, clip: CLIP, vae: VAE) -> BaseModel:
    """The base that this graph would sample with. Loads nothing.

    Raises:
        SubjectBoothError: the model cannot be trained on, or has patches that are not weights.
    """
    layout, family = check_wired_family(model, clip, vae), family_of(model)
    return BaseModel(
        family=family.name,
        denoiser=WiredDenoiser(model, family, latent_factor(vae), _metadata(model, layout), layout),
        prompts=WiredPromptEncoder(clip),
        codec=ComfyLatentCodec(model, vae),
        digest=sha256_of(base_digest(model, clip, vae), canonical_json(family.training_defaults)),
        prompt_of=literal_prompt,
        sampling_digest=base_digest(model, clip),
        note=""
        if family.is_tried
        else f"{family.name} trains like any other family, but was never tried: check the validation images",
    )


def check_wired_family(model: ModelPatcher, clip: CLIP | None, vae: VAE | None) -> LdmLayout | None:
    """Reject what cannot be trained on, before anything expensive; return the layout of Stable Diffusion otherwise.

    Raises:
        SubjectBoothError: a part is missing or of another family, the model does not make pictures from text alone,
            or it has patches that are not weights.
    """
    if is_stable_diffusion(model):
        return check_wired(model, clip, vae, is_quantised_allowed=True)
    clip, vae = check_parts(model, clip, vae)
    base, name = model.model, family_of(model).name
    if getattr(base.latent_format, "latent_dimensions", 2) == 1:
        raise SubjectBoothError(
            f"{name} makes sound or shapes", "a model that makes pictures from text", "connect another model", "MODEL"
        )
    if _takes_a_picture(base):
        raise SubjectBoothError(
            f"{name} also takes a picture, as inpainting, editing and image-to-video models do",
            "a model that makes pictures from text alone",
            "connect the base model of the family",
            "MODEL",
        )
    if vae.latent_channels != base.latent_format.latent_channels:
        raise SubjectBoothError(
            f"the VAE has {vae.latent_channels} latent channels, and {name} has {base.latent_format.latent_channels}",
            "the VAE of the model's family",
            "connect the VAE that belongs to the model",
            "VAE",
        )
    return None


def _takes_a_picture(base: Any) -> bool:
    """Whether the model takes more than a prompt beside the latents, as ComfyUI would add it to them."""
    latents = base.latent_format
    noise = torch.zeros(1, latents.latent_channels, *[1] * (latents.latent_dimensions - 2), 16, 16)
    return bool(base.concat_keys) or base.concat_cond(noise=noise, device=noise.device) is not None


def _metadata(model: ModelPatcher, layout: LdmLayout | None) -> Mapping[str, str] | None:
    """Of Stable Diffusion as always; None for the family's."""
    if layout is None:
        return None
    return DiffusersUNet(layout, make_noise_scheduler(*noise_schedule(model)), dict).metadata


class WiredPromptEncoder:
    """Encodes prompts with the connected CLIP, and keeps everything that it gives beside the hidden states."""

    def __init__(self, clip: CLIP) -> None:
        self._clip = clip

    def encode(self, prompts: Sequence[str]) -> list[Conditioning]:
        """See :class:`trainer.base.conditioning.PromptEncoder`."""
        return [WiredConditioning((WiredPrompt.encode(self._clip, prompt),)) for prompt in prompts]
