"""A base model from a single-file checkpoint, for runs from a shell: no network, no configuration files.

Inside ComfyUI the base comes from the wired MODEL, CLIP and VAE instead.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from .base_model import BaseModel, build_unet, inspect_unet, lora_layer_names, make_noise_scheduler
from .conditioning import Conditioning
from .errors import SubjectBoothError, require
from .families import Family
from .storage import sha256_of
from .text_encoder import TokenChunks, build_text_encoder, encode, from_open_clip
from .tokenizer import chunks

if TYPE_CHECKING:
    from diffusers import UNet2DConditionModel

UNET, VAE = "model.diffusion_model.", "first_stage_model."


def base_from_file(path: Path, clip_skip: int | None = None, prediction_type: str = "epsilon") -> BaseModel:
    """Read a Stable Diffusion checkpoint of one of the families in :mod:`trainer.families`.

    Args:
        path: a .safetensors file in the layout of the original Stable Diffusion release.
        clip_skip: kohya's count: 1 takes the text encoder's last layer, 2 the one before; None the family's own.
        prediction_type: ``epsilon``, or ``v_prediction`` for SD 2.x at 768 pixels. A file that says so itself
            (``v_pred``, ``ztsnr``) is believed.

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
    unet, vae = (_below(whole, prefix) for prefix in (UNET, VAE))
    family = inspect_unet({name: tensor.shape for name, tensor in unet.items()}, str(path))
    if not vae:
        raise SubjectBoothError("a checkpoint without a VAE", "a whole checkpoint",
                                "use one that was saved with all its parts", str(path))
    text = _text_weights(whole, family, str(path))
    shapes = {name: tensor.shape for name, tensor in unet.items()}
    clip_layer = None if clip_skip is None else -clip_skip
    prediction_type = "v_prediction" if "v_pred" in whole else prediction_type

    def build(dtype: torch.dtype) -> UNet2DConditionModel:
        return build_unet(shapes, lambda: unet, family, dtype, str(path))

    def build_text(dtype: torch.dtype) -> list[Any]:
        return [build_text_encoder(weights, shape, dtype, str(path))
                for weights, shape in zip(text, family.text_encoders, strict=True)]

    return BaseModel(
        family=family,
        noise_scheduler=make_noise_scheduler(_stable_diffusion_schedule("ztsnr" in whole), prediction_type),
        prompts=FilePromptEncoder(build_text(torch.float32), family, clip_layer),
        codec=_codec(vae, family),
        digest=sha256_of(path, f"clip layer {clip_layer}", prediction_type),
        build_unet=build,
        layer_names=lora_layer_names(shapes, family),
        clip_layer=clip_layer,
        tokenize=lambda prompt: token_chunks(prompt, family),
        build_text_encoders=build_text)


class FilePromptEncoder:
    """Encodes prompts with transformers. Text is taken literally: ``(word:1.2)`` is ComfyUI's syntax, not CLIP's."""

    def __init__(self, models: Sequence[Any], family: Family, clip_layer: int | None) -> None:
        self._models, self._family, self._clip_layer = models, family, clip_layer

    def encode(self, prompts: Sequence[str]) -> list[Conditioning]:
        """See :class:`trainer.conditioning.PromptEncoder`."""
        with torch.no_grad():
            return encode(self._models, self._family.text_encoders,
                          [token_chunks(prompt, self._family) for prompt in prompts], self._clip_layer)


def token_chunks(prompt: str, family: Family) -> tuple[TokenChunks, ...]:
    """A prompt's chunks for each text encoder of the family, all at weight 1."""
    ids = [chunks(prompt, shape.padding) for shape in family.text_encoders]
    return tuple(TokenChunks(rows, torch.ones(rows.shape)) for rows in ids)


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


def _text_weights(whole: dict[str, torch.Tensor], family: Family, where: str) -> list[dict[str, torch.Tensor]]:
    found = []
    for shape in family.text_encoders:
        own = _below(whole, shape.single_file)
        if not own:
            raise SubjectBoothError("a checkpoint without a text encoder", "a whole checkpoint",
                                    "use one that was saved with all its parts", where)
        found.append(from_open_clip(own) if shape.open_clip else own)
    return found


def _below(tensors: dict[str, torch.Tensor], prefix: str) -> dict[str, torch.Tensor]:
    return {name.removeprefix(prefix): tensor for name, tensor in tensors.items() if name.startswith(prefix)}


def _stable_diffusion_schedule(zero_terminal_snr: bool = False) -> torch.Tensor:
    """``alphas_cumprod`` of Stable Diffusion: betas from 0.00085 to 0.012, linear in their square root.

    With ``zero_terminal_snr`` rescaled so that the last step is pure noise (arXiv 2305.08891, algorithm 1), but for
    the small remainder that ComfyUI leaves too.
    """
    betas = torch.linspace(0.00085**0.5, 0.012**0.5, 1000, dtype=torch.float64) ** 2
    alphas = torch.cumprod(1.0 - betas, dim=0)
    if zero_terminal_snr:
        root = alphas.sqrt()
        alphas = ((root - root[-1]) * root[0] / (root[0] - root[-1])) ** 2
        alphas[-1] = 4.8973451890853435e-08
    return alphas.float()
