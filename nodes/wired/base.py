"""The base of a connected MODEL that is trained as it is; the counterpart of :mod:`nodes.bridge` for other families."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from comfy.ldm.modules.diffusionmodules.openaimodel import UNetModel
from comfy.model_patcher import ModelPatcher
from comfy.sd import CLIP, VAE

from ...trainer.base.base_model import BaseModel
from ...trainer.base.conditioning import Conditioning
from ...trainer.errors import SubjectBoothError
from ..bridge import base_digest, literal_prompt, to_cpu_float32
from ..wired_checks import refuse_unlearnable_patches
from .conditioning import WiredConditioning, WiredPrompt
from .denoiser import WiredDenoiser
from .families import family_of


def is_trained_as_wired(model: ModelPatcher) -> bool:
    """Whether the model is of a family that diffusers' UNets of SD 1.x, 2.x and SDXL cannot stand for."""
    return not isinstance(model.model.diffusion_model, UNetModel)


def wired_base(model: ModelPatcher, clip: CLIP, vae: VAE) -> BaseModel:
    """The base that this graph would sample with. Loads nothing.

    Raises:
        SubjectBoothError: the model cannot be trained on, or has patches that are not weights.
    """
    check_wired_family(model, clip, vae)
    family = family_of(model)
    return BaseModel(
        family=family.name,
        denoiser=WiredDenoiser(model, family, latent_factor(vae)),
        prompts=WiredPromptEncoder(clip),
        codec=WiredLatentCodec(model, vae),
        digest=base_digest(model, clip, vae),
        prompt_of=literal_prompt,
        sampling_digest=base_digest(model, clip),
    )


def check_wired_family(model: ModelPatcher, clip: CLIP | None, vae: VAE | None) -> None:
    """Reject what cannot be trained on, before anything expensive.

    Raises:
        SubjectBoothError: a part is missing or of another family, the model does not make pictures from text alone,
            or it has patches that are not weights.
    """
    for part, name in ((clip, "CLIP"), (vae, "VAE")):
        if part is None:
            raise SubjectBoothError(
                f"the checkpoint has no {name}", f"a {name}", f"connect a {name} loader of the model's family", name
            )
    assert clip is not None and vae is not None
    for patcher, where in ((model, "MODEL"), (clip.patcher, "CLIP")):
        refuse_unlearnable_patches(patcher, where)
    base, name = model.model, family_of(model).name
    if getattr(base.latent_format, "latent_dimensions", 2) == 1:
        raise SubjectBoothError(
            f"{name} makes sound or shapes", "a model that makes pictures from text", "connect another model", "MODEL"
        )
    if base.concat_keys:
        raise SubjectBoothError(
            f"{name} also takes a picture ({', '.join(base.concat_keys)}), as inpainting and editing models do",
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


def latent_factor(vae: VAE) -> int:
    """Image pixels per latent pixel, along a side."""
    return int(vae.spacial_compression_encode())


class WiredPromptEncoder:
    """Encodes prompts with the connected CLIP, and keeps everything that it gives beside the hidden states."""

    def __init__(self, clip: CLIP) -> None:
        self._clip = clip

    def encode(self, prompts: Sequence[str]) -> list[Conditioning]:
        """See :class:`trainer.base.conditioning.PromptEncoder`."""
        return [WiredConditioning((WiredPrompt.encode(self._clip, prompt),)) for prompt in prompts]


class WiredLatentCodec:
    """Encodes and decodes with the connected VAE; pictures of a family for video are videos of one frame."""

    def __init__(self, model: ModelPatcher, vae: VAE) -> None:
        self._latent_format, self._vae = model.model.latent_format, vae
        self._frames = int(getattr(self._latent_format, "latent_dimensions", 2)) == 3

    def encode(self, images: torch.Tensor) -> torch.Tensor:
        """See :class:`trainer.base.conditioning.LatentCodec`."""
        # One by one: such a VAE takes a batch for the frames of one video.
        parts = images.split(1) if self._frames else (images,)
        with torch.inference_mode():
            latents = torch.cat([self._vae.encode(part.movedim(1, -1)) for part in parts])
            latents = self._latent_format.process_in(latents)
        return to_cpu_float32(latents.squeeze(2) if self._frames else latents)

    def decode(self, latents: torch.Tensor) -> torch.Tensor:
        """See :class:`trainer.base.conditioning.LatentCodec`."""
        latents = latents.unsqueeze(2) if self._frames else latents
        with torch.inference_mode():
            images = self._vae.decode(self._latent_format.process_out(latents))
        images = images.flatten(0, 1) if images.ndim == 5 else images  # [n, frames, h, w, 3]
        return to_cpu_float32(images.movedim(-1, 1)).clamp(0, 1)
