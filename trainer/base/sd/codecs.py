"""Latent codecs without ComfyUI: TAESD and Stable Diffusion's VAE."""

from __future__ import annotations

import logging
import re
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch

from ...errors import SubjectBoothError
from ...machine.numerics import CPU
from ...machine.out_of_memory import free_memory, is_out_of_memory
from ..conditioning import in_parts
from ..finite import check_weight

logger = logging.getLogger("subjectbooth")

LATENT_CHANNELS = 4
"""In all supported families."""

# Names of attention layers before diffusers 0.17, as in most published SD 1.x folders.
_OLD_NAMES = {"query": "to_q", "key": "to_k", "value": "to_v", "proj_attn": "to_out.0"}


class TinyCodec:
    """TAESD (MIT, github.com/madebyollin/taesd). Its latents need no scaling.

    Args:
        weights: in diffusers' naming.
        where: source of the weights, for messages.

    Attributes:
        device: where images are encoded and decoded; see :func:`_on_device`.

    Raises:
        SubjectBoothError: a weight is not finite.
    """

    def __init__(self, weights: Mapping[str, torch.Tensor], where: str) -> None:
        from diffusers import AutoencoderTiny

        self.device = CPU
        model = AutoencoderTiny()
        model.load_state_dict({name: tensor.float() for name, tensor in weights.items()})
        _check_weights(model, where)
        self._model = model.requires_grad_(False).eval()

    @torch.no_grad()
    def encode(self, images: torch.Tensor) -> torch.Tensor:
        """See :class:`trainer.base.conditioning.LatentCodec`."""
        return _on_device(
            self._model, self.device, in_parts(images), lambda part: self._model.encode(part * 2 - 1).latents
        )

    @torch.no_grad()
    def decode(self, latents: torch.Tensor) -> torch.Tensor:
        """See :class:`trainer.base.conditioning.LatentCodec`."""
        images = _on_device(self._model, self.device, in_parts(latents), lambda part: self._model.decode(part).sample)
        return (images / 2 + 0.5).clamp(0, 1)


class KLCodec:
    """Stable Diffusion's VAE. Encodes to the posterior's mean, like ComfyUI.

    Args:
        weights: in diffusers' naming; widths and depths are read from their shapes.
        latent_scale: factor from the VAE's latents to the UNet's.
        where: source of the weights, for messages.

    Attributes:
        device: where images are encoded and decoded; see :func:`_on_device`.

    Raises:
        SubjectBoothError: weights are missing or not finite, or the VAE is of another family.
    """

    def __init__(self, weights: Mapping[str, torch.Tensor], latent_scale: float, where: str) -> None:
        from diffusers import AutoencoderKL

        self.device = CPU
        named = {_new_name(name): tensor for name, tensor in weights.items()}
        named = {
            name: tensor.reshape(tensor.shape[:2]) if _is_attention(name) else tensor for name, tensor in named.items()
        }
        model = AutoencoderKL(**_config(named, where))
        try:
            model.load_state_dict(named)
        except RuntimeError as error:
            raise SubjectBoothError(
                "the VAE has missing or unknown weights",
                "Stable Diffusion's VAE",
                "use an unmodified checkpoint",
                where,
            ) from error
        _check_weights(model, where)
        self._model = torch.nn.Module.to(model, torch.float32).requires_grad_(False).eval()
        self._scale = latent_scale

    @torch.no_grad()
    def encode(self, images: torch.Tensor) -> torch.Tensor:
        """See :class:`trainer.base.conditioning.LatentCodec`."""
        # One by one: an image of 512 px needs several GB of activations.
        means = _on_device(
            self._model,
            self.device,
            images.split(1),
            lambda image: self._model.encode(image * 2 - 1).latent_dist.mode(),
        )
        return means * self._scale

    @torch.no_grad()
    def decode(self, latents: torch.Tensor) -> torch.Tensor:
        """See :class:`trainer.base.conditioning.LatentCodec`."""
        images = _on_device(
            self._model,
            self.device,
            [picture[None] / self._scale for picture in latents],
            lambda picture: self._model.decode(picture).sample,
        )
        return (images / 2 + 0.5).clamp(0, 1)


def _on_device(
    model: Any,
    device: torch.device,
    parts: Sequence[torch.Tensor],
    work: Callable[[torch.Tensor], torch.Tensor],
) -> torch.Tensor:
    """Apply ``work`` to each part with the model on the device; the concatenated results, float32 on the CPU.

    The model is on the device only during the call: copying a VAE's 0.34 GB takes a tenth of a second, and training
    steps need that memory. If the device runs out of memory, the CPU is used.
    """
    if device != CPU:
        try:
            torch.nn.Module.to(model, device)
            return torch.cat([work(part.to(device)).float().cpu() for part in parts])
        except Exception as error:
            if not is_out_of_memory(error):
                raise
        finally:
            torch.nn.Module.to(model, CPU)
        free_memory(device)  # outside the handler, which keeps the failed attempt's tensors alive
        logger.warning("too little memory on %s for the VAE: using the CPU", device)
    return torch.cat([work(part).float() for part in parts])


def _check_weights(model: torch.nn.Module, where: str) -> None:
    for name, weight in model.named_parameters():
        check_weight(name, weight, weight, "VAE", where)


def from_taesd(weights: Mapping[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """From TAESD's names (``taesd_encoder.0.weight``) to diffusers'."""
    renamed = {}
    for name, tensor in weights.items():
        part, number, rest = name.split(".", 2)
        # In TAESD's decoder the clamp counts as a layer, in diffusers' it does not.
        shift = 1 if part == "taesd_decoder" else 0
        renamed[f"{part.removeprefix('taesd_')}.layers.{int(number) - shift}.{rest}"] = tensor
    return renamed


def from_ldm_vae(weights: Mapping[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """From the names of single-file checkpoints to diffusers'."""
    from diffusers.loaders.single_file_utils import convert_ldm_vae_checkpoint

    levels = _count(weights, r"encoder\.down\.(\d+)\.")
    prefixed = {f"first_stage_model.{name}": tensor for name, tensor in weights.items()}
    return convert_ldm_vae_checkpoint(prefixed, {"down_block_types": [""] * levels, "up_block_types": [""] * levels})


def refuse_other_latents(channels: int, where: str) -> None:
    """Reject the VAE of another family.

    Raises:
        SubjectBoothError: the VAE is of SD 3, Flux or a video model.
    """
    if channels != LATENT_CHANNELS:
        raise SubjectBoothError(
            f"the VAE has {channels} latent channels (it is of another family, such as SD 3 or Flux)",
            f"a VAE with {LATENT_CHANNELS}, as the model has",
            "use the VAE that belongs to the model",
            where,
        )


def _config(weights: Mapping[str, torch.Tensor], where: str) -> dict[str, Any]:
    into_decoder = weights.get("decoder.conv_in.weight")
    levels = _count(weights, r"encoder\.down_blocks\.(\d+)\.")
    if into_decoder is None or not levels:
        raise SubjectBoothError(
            "the VAE has an unknown layout", "Stable Diffusion's VAE", "use an unmodified checkpoint", where
        )
    refuse_other_latents(into_decoder.shape[1], where)
    first = "encoder.down_blocks.{}.resnets.0.conv2.weight"
    return {
        "block_out_channels": tuple(weights[first.format(level)].shape[0] for level in range(levels)),
        "layers_per_block": _count(weights, r"encoder\.down_blocks\.0\.resnets\.(\d+)\."),
        "latent_channels": LATENT_CHANNELS,
        "down_block_types": ("DownEncoderBlock2D",) * levels,
        "up_block_types": ("UpDecoderBlock2D",) * levels,
    }


def _count(weights: Mapping[str, torch.Tensor], numbered: str) -> int:
    found = (re.match(numbered, name) for name in weights)
    return 1 + max((int(match.group(1)) for match in found if match), default=-1)


def _is_attention(name: str) -> bool:
    return ".attentions.0.to_" in name and name.endswith("weight")


def _new_name(name: str) -> str:
    for old, new in _OLD_NAMES.items():
        name = re.sub(rf"(\.attentions\.\d+)\.{old}\.(weight|bias)$", rf"\1.{new}.\2", name)
    return name
