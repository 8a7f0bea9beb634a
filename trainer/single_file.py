"""A base model from a single-file checkpoint, for runs from a shell: no network, no configuration files.

Inside ComfyUI the base comes from the wired MODEL, CLIP and VAE instead.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from .base_model import BaseModel, build_unet, inspect_unet, make_noise_scheduler
from .conditioning import Conditioning
from .errors import SubjectBoothError, require
from .families import Family
from .storage import sha256_of
from .tokenizer import chunks

if TYPE_CHECKING:
    from diffusers import UNet2DConditionModel
    from transformers import CLIPTextModel

UNET, TEXT, VAE = "model.diffusion_model.", "cond_stage_model.transformer.", "first_stage_model."


def base_from_file(path: Path, clip_skip: int = 1) -> BaseModel:
    """Read an SD 1.x checkpoint.

    Args:
        path: a .safetensors file in the layout of the original Stable Diffusion release.
        clip_skip: kohya's count: 1 takes the text encoder's last layer, 2 the one before.

    Raises:
        SubjectBoothError: it is of another format or family, or parts are missing.
    """
    require("diffusers", "transformers")
    import safetensors.torch

    if path.suffix.lower() != ".safetensors":
        raise SubjectBoothError(f"a checkpoint of the format {path.suffix or '(none)'}", "a .safetensors file",
                                "convert it; pickled files are never opened", str(path))
    try:
        whole = safetensors.torch.load_file(path)
    except Exception as error:  # whatever a damaged file does to its reader
        raise SubjectBoothError(f"a checkpoint that cannot be read ({type(error).__name__})",
                                "a whole .safetensors file", "get the file again", str(path)) from error
    unet, text, vae = (_below(whole, prefix) for prefix in (UNET, TEXT, VAE))
    family = inspect_unet({name: tensor.shape for name, tensor in unet.items()}, str(path))
    for part, found in (("text encoder", text), ("VAE", vae)):
        if not found:
            raise SubjectBoothError(f"a checkpoint without a {part}", "a whole checkpoint",
                                    "use one that was saved with all its parts", str(path))

    def build(dtype: torch.dtype) -> UNet2DConditionModel:
        return build_unet({name: tensor.shape for name, tensor in unet.items()}, lambda: unet, family, dtype,
                          str(path))

    return BaseModel(
        family=family, noise_scheduler=make_noise_scheduler(_stable_diffusion_schedule(), "epsilon"),
        prompts=FilePromptEncoder(text, clip_skip), codec=_codec(vae, family),
        digest=sha256_of(path, f"clip skip {clip_skip}"), build_unet=build, clip_skip=clip_skip)


class FilePromptEncoder:
    """Encodes prompts with transformers. Text is taken literally: ``(word:1.2)`` is ComfyUI's syntax, not CLIP's."""

    def __init__(self, weights: dict[str, torch.Tensor], clip_skip: int) -> None:
        self._model = _text_model(weights)
        self._clip_skip = clip_skip

    def encode(self, prompts: Sequence[str]) -> list[Conditioning]:
        """See :class:`trainer.conditioning.PromptEncoder`."""
        return [self._encode(prompt) for prompt in prompts]

    @torch.no_grad()
    def _encode(self, prompt: str) -> Conditioning:
        # Transformers 5.6 dropped the inner module that older ones keep the final norm in.
        inner = getattr(self._model, "text_model", self._model)
        output = self._model(chunks(prompt), output_hidden_states=True)
        hidden_states = inner.final_layer_norm(output.hidden_states[-self._clip_skip])
        return Conditioning(hidden_states.reshape(1, -1, hidden_states.shape[-1]).float())


class TinyCodec:
    """TAESD (MIT, github.com/madebyollin/taesd), whose latents are in the training space as they come."""

    def __init__(self, weights: dict[str, torch.Tensor]) -> None:
        from diffusers import AutoencoderTiny

        model = AutoencoderTiny()
        renamed = {}
        for name, tensor in weights.items():
            part, number, rest = name.split(".", 2)
            # TAESD's decoder counts its clamp as a layer, diffusers' does not.
            shift = 1 if part == "taesd_decoder" else 0
            renamed[f"{part.removeprefix('taesd_')}.layers.{int(number) - shift}.{rest}"] = tensor.float()
        model.load_state_dict(renamed)
        self._model = model.requires_grad_(False).eval()

    @torch.no_grad()
    def encode(self, images: torch.Tensor) -> torch.Tensor:
        """See :class:`trainer.conditioning.LatentCodec`."""
        return self._model.encode(images * 2 - 1).latents.float()

    @torch.no_grad()
    def decode(self, latents: torch.Tensor) -> torch.Tensor:
        """See :class:`trainer.conditioning.LatentCodec`."""
        return (self._model.decode(latents).sample / 2 + 0.5).clamp(0, 1).float()


class KLCodec:
    """Stable Diffusion's own VAE. Encoding gives the posterior's mean, as inside ComfyUI."""

    def __init__(self, weights: dict[str, torch.Tensor], latent_scale: float) -> None:
        from diffusers import AutoencoderKL
        from diffusers.loaders.single_file_utils import convert_ldm_vae_checkpoint

        config: dict[str, Any] = {
            "block_out_channels": (128, 256, 512, 512), "layers_per_block": 2, "latent_channels": 4,
            "down_block_types": ("DownEncoderBlock2D",) * 4, "up_block_types": ("UpDecoderBlock2D",) * 4,
        }
        model = AutoencoderKL(**config)
        prefixed = {f"first_stage_model.{name}": tensor for name, tensor in weights.items()}
        model.load_state_dict(convert_ldm_vae_checkpoint(prefixed, config))
        self._model = torch.nn.Module.to(model, torch.float32).requires_grad_(False).eval()
        self._scale = latent_scale

    @torch.no_grad()
    def encode(self, images: torch.Tensor) -> torch.Tensor:
        """See :class:`trainer.conditioning.LatentCodec`."""
        # One at a time: a photo at 512 px needs several GB of activations in the VAE.
        means = [self._model.encode(image[None] * 2 - 1).latent_dist.mode() for image in images]
        return torch.cat(means) * self._scale

    @torch.no_grad()
    def decode(self, latents: torch.Tensor) -> torch.Tensor:
        """See :class:`trainer.conditioning.LatentCodec`."""
        images = [self._model.decode(picture[None] / self._scale).sample for picture in latents]
        return (torch.cat(images) / 2 + 0.5).clamp(0, 1)


def _codec(weights: dict[str, torch.Tensor], family: Family) -> TinyCodec | KLCodec:
    tiny = {name: tensor for name, tensor in weights.items() if name.startswith("taesd_")}
    return TinyCodec(tiny) if tiny else KLCodec(weights, family.latent_scale)


def _text_model(weights: dict[str, torch.Tensor]) -> CLIPTextModel:
    from transformers import CLIPTextConfig, CLIPTextModel

    config = CLIPTextConfig(
        hidden_size=768, intermediate_size=3072, num_hidden_layers=12, num_attention_heads=12,
        hidden_act="quick_gelu", vocab_size=49408, max_position_embeddings=77, bos_token_id=49406,
        eos_token_id=49407)
    model = CLIPTextModel(config)
    expected = model.state_dict()
    named = {name: tensor.float() for name, tensor in weights.items() if not name.endswith("position_ids")}
    if not any(name.startswith("text_model.") for name in expected):
        named = {name.removeprefix("text_model."): tensor for name, tensor in named.items()}
    model.load_state_dict({name: tensor for name, tensor in named.items() if name in expected}, strict=False)
    missing = [name for name in expected if name not in named and not name.endswith("position_ids")]
    if missing:
        raise SubjectBoothError(f"a text encoder without {missing[0]!r}", "all of CLIP ViT-L/14's text weights",
                                "use an unmodified checkpoint", "text encoder")
    return model.requires_grad_(False).eval()


def _below(tensors: dict[str, torch.Tensor], prefix: str) -> dict[str, torch.Tensor]:
    return {name.removeprefix(prefix): tensor for name, tensor in tensors.items() if name.startswith(prefix)}


def _stable_diffusion_schedule() -> torch.Tensor:
    """``alphas_cumprod`` of Stable Diffusion: betas from 0.00085 to 0.012, linear in their square root."""
    betas = torch.linspace(0.00085**0.5, 0.012**0.5, 1000, dtype=torch.float64) ** 2
    return torch.cumprod(1.0 - betas, dim=0).float()
