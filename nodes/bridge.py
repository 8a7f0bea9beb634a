"""Builds the trainer's base model from a connected MODEL, CLIP and VAE."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from comfy.model_patcher import ModelPatcher
from comfy.sd import CLIP, VAE

from ..trainer.base.base_model import BaseModel
from ..trainer.base.conditioning import Conditioning, EncodedText, in_parts
from ..trainer.base.sd.clip_text import ClipText
from ..trainer.base.sd.codecs import refuse_other_latents
from ..trainer.base.sd.denoiser import DiffusersUNet
from ..trainer.base.sd.families import Family
from ..trainer.base.sd.layout import LdmLayout
from ..trainer.base.sd.schedule import make_noise_scheduler
from ..trainer.base.sd.text_encoder import TokenChunks, build_text_encoder
from ..trainer.errors import SubjectBoothError
from ..trainer.files.storage import canonical_json, sha256_of
from .host import release_models
from .noise import noise_schedule, sigmas_of, type_name
from .weights import digest_of, effective_weights, refuse_comfy_quant, shapes_of, stored_as
from .wired_checks import UNET_PREFIX, refuse_unlearnable_patches


def base_from_graph(model: ModelPatcher, clip: CLIP, vae: VAE) -> BaseModel:
    """The base that this graph would sample with, including patches, noise schedule, prediction type and CLIP skip.

    Nothing is loaded or copied yet; building the network unloads ComfyUI's models from the device.

    Raises:
        SubjectBoothError: the model cannot be trained on, or has patches that are not weights.
    """
    layout = check_wired(model, clip, vae)
    family = layout.family
    alphas_cumprod, prediction_type = noise_schedule(model)

    def unet_weights() -> Mapping[str, torch.Tensor]:
        release_models()
        return effective_weights(model, UNET_PREFIX)

    return BaseModel(
        family=family.name,
        denoiser=DiffusersUNet(layout, make_noise_scheduler(alphas_cumprod, prediction_type), unet_weights),
        prompts=ComfyPromptEncoder(clip, pooled=family.adm_channels is not None),
        codec=ComfyLatentCodec(model, vae),
        digest=base_digest(model, clip, vae),
        text=ClipText(
            family,
            clip.layer_idx,
            lambda prompt: token_chunks(clip, prompt, family),
            lambda dtype: text_encoders(clip, family, dtype),
        ),
        prompt_of=literal_prompt,
        sampling_digest=base_digest(model, clip),
    )


def check_wired(
    model: ModelPatcher, clip: CLIP | None, vae: VAE | None, is_quantised_allowed: bool = False
) -> LdmLayout:
    """Reject what cannot be trained on before anything expensive happens; return the layout otherwise.

    Reads only names, shapes and dtypes; loads nothing.

    Args:
        is_quantised_allowed: whether the MODEL may be in fp8, as when its own module is trained on.

    Raises:
        SubjectBoothError: something is missing, of another family or architecture, quantised, or has patches that
            are not weights.
    """
    clip, vae = check_parts(model, clip, vae)
    for patcher, where in ((model, "MODEL"), (clip.patcher, "CLIP"), (vae.patcher, "VAE")):
        refuse_comfy_quant(patcher, where)
    dtypes = None if is_quantised_allowed else stored_as(model, UNET_PREFIX)
    layout = LdmLayout.of(shapes_of(model, UNET_PREFIX), "MODEL", dtypes)
    family = layout.family
    noise_schedule(model)
    wanted = {f"clip_{shape.name}" for shape in family.text_encoders}
    found = {name.split(".")[0] for name in clip.patcher.model_state_dict() if "." in name}
    if wanted != found:
        raise SubjectBoothError(
            f"the CLIP has {', '.join(sorted(found)) or 'no text encoder'}, but the model is {family.name}",
            f"a CLIP with {', '.join(sorted(wanted))}",
            "connect the CLIP that belongs to the model",
            "CLIP",
        )
    refuse_other_latents(getattr(vae, "latent_channels", 4), "VAE")
    return layout


def check_parts(model: ModelPatcher, clip: CLIP | None, vae: VAE | None) -> tuple[CLIP, VAE]:
    """Reject what no model can be trained with, of whatever family; return the CLIP and VAE, which are there.

    Raises:
        SubjectBoothError: a part is missing, or MODEL or CLIP has patches that are not weights.
    """
    if clip is None or vae is None:
        missing = "CLIP" if clip is None else "VAE"
        raise SubjectBoothError(
            f"the checkpoint has no {missing}",
            f"a {missing}",
            f"connect a {missing} loader, or use a checkpoint that has one",
            missing,
        )
    for patcher, where in ((model, "MODEL"), (clip.patcher, "CLIP")):
        refuse_unlearnable_patches(patcher, where)
    return clip, vae


def token_chunks(clip: CLIP, prompt: str, family: Family) -> tuple[TokenChunks, ...]:
    """The token chunks and weights that the connected CLIP makes of a prompt, for each text encoder of the family.

    Raises:
        SubjectBoothError: the prompt uses a textual-inversion embedding, which a text encoder in training cannot use.
    """
    chunks = []
    tokens = clip.tokenize(prompt)
    for shape in family.text_encoders:
        if any(not isinstance(token[0], int) for chunk in tokens[shape.name] for token in chunk):
            raise SubjectBoothError(
                f"the prompt {prompt[:60]!r} contains an embedding:",
                "plain words",
                "remove the embedding, or turn off train_text_encoder",
                "train_text_encoder",
            )
        ids = torch.tensor([[token[0] for token in chunk] for chunk in tokens[shape.name]])
        weights = torch.tensor([[float(token[1]) for token in chunk] for chunk in tokens[shape.name]])
        chunks.append(TokenChunks(ids, weights))
    return tuple(chunks)


def literal_prompt(caption: str) -> str:
    """Escape a caption, so that ComfyUI reads it literally: unescaped parentheses would set weights and vanish."""
    return caption.replace("(", "\\(").replace(")", "\\)")


def text_encoders(clip: CLIP, family: Family, dtype: torch.dtype) -> list[Any]:
    """Trainable copies of the connected CLIP's text encoders, with its patches applied."""
    weights = effective_weights(clip.patcher)
    models = []
    for shape in family.text_encoders:
        prefix = f"clip_{shape.name}.transformer."
        own = {key.removeprefix(prefix): weights[key] for key in weights if key.startswith(prefix)}
        models.append(build_text_encoder(own, shape, dtype, "CLIP"))
    return models


def base_digest(model: ModelPatcher, clip: CLIP | None = None, vae: VAE | None = None) -> str:
    """SHA-256 over everything in the connected base that affects training or sampling."""
    # The sampling object is hashed separately: ComfyUI swaps it into the module while a patched clone is loaded.
    parts = [digest_of(model, UNET_PREFIX), sha256_of(sigmas_of(model).cpu()), type_name(model)]
    parts += [digest_of(clip.patcher), canonical_json([clip.layer_idx, clip.tokenizer_options])] if clip else []
    parts += [digest_of(vae.patcher)] if vae else []
    return sha256_of(*parts)


class ComfyPromptEncoder:
    """Encodes prompts with the connected CLIP: its weights, patches, CLIP skip and prompt syntax."""

    def __init__(self, clip: CLIP, pooled: bool = False) -> None:
        self._clip = clip
        self._pooled = pooled

    def encode(self, prompts: Sequence[str]) -> list[Conditioning]:
        """See :class:`trainer.base.conditioning.PromptEncoder`."""
        return [self._encode(prompt) for prompt in prompts]

    def _encode(self, prompt: str) -> Conditioning:
        with torch.inference_mode():
            hidden_states, pooled = self._clip.encode_from_tokens(self._clip.tokenize(prompt), return_pooled=True)
        return EncodedText(to_cpu_float32(hidden_states), to_cpu_float32(pooled) if self._pooled else None)


class ComfyLatentCodec:
    """Encodes and decodes with the connected VAE, in the latent space of the connected model.

    A picture of a family for video is a video of one frame, which its latents here do not count: [n, c, h, w].
    """

    def __init__(self, model: ModelPatcher, vae: VAE) -> None:
        self._latent_format, self._vae = model.model.latent_format, vae
        self._has_frames = has_frames(model)

    def encode(self, images: torch.Tensor) -> torch.Tensor:
        """See :class:`trainer.base.conditioning.LatentCodec`.

        ComfyUI returns the posterior's mean, not a sample, so the latents are the same every time.
        """
        # One by one: a VAE for video takes a batch for the frames of one video.
        parts = images.split(1) if self._has_frames else in_parts(images)
        with torch.inference_mode():
            latents = torch.cat([self._vae.encode(part.movedim(1, -1)) for part in parts])
            latents = self._latent_format.process_in(latents)
        return to_cpu_float32(latents.squeeze(2) if self._has_frames else latents)

    def decode(self, latents: torch.Tensor) -> torch.Tensor:
        """See :class:`trainer.base.conditioning.LatentCodec`."""
        latents = latents.unsqueeze(2) if self._has_frames else latents
        with torch.inference_mode():
            images = self._vae.decode(self._latent_format.process_out(latents))
        images = images.flatten(0, 1) if images.ndim == 5 else images  # [n, frames, h, w, 3]
        return to_cpu_float32(images.movedim(-1, 1)).clamp(0, 1)


def has_frames(model: ModelPatcher) -> bool:
    """Whether latents of the model have a dimension for time, as those of families for video have."""
    return int(getattr(model.model.latent_format, "latent_dimensions", 2)) == 3


def latent_factor(vae: VAE) -> int:
    """Image pixels per latent pixel, along a side."""
    return int(vae.spacial_compression_encode())


def to_cpu_float32(tensor: torch.Tensor) -> torch.Tensor:
    """A float32 copy on the CPU that autograd accepts; it rejects tensors created in inference mode."""
    with torch.inference_mode(False):
        return tensor.detach().to("cpu", torch.float32, copy=True).clone()
