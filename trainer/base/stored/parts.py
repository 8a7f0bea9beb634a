"""The result of reading a single file or a diffusers folder."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path

import torch

from ...errors import SubjectBoothError
from ..sd.codecs import KLCodec, TinyCodec
from ..sd.families import Family
from .tensors import StoredTensors

WeightsReader = Callable[[], Mapping[str, torch.Tensor]]


@dataclass(frozen=True)
class StoredParts:
    """The content of a checkpoint, in the trainer's naming.

    Attributes:
        files: all files that define the base.
        unet: in the single-file layout, without the prefix.
        text_encoders: for a family and a layer (in ComfyUI's counting), a reader of each text encoder's weights, with
            transformers' names (``text_model.encoder...``).
        codec: builds the latent codec.
        prediction_type: as stated by the checkpoint; None if it does not state it.
        alphas_cumprod: the noise schedule.
        latent_scale: of the codec, as stated by the checkpoint; None if it does not state it.
    """

    files: tuple[Path, ...]
    unet: StoredTensors
    text_encoders: Callable[[Family, int | None], list[WeightsReader]]
    codec: Callable[[Family], TinyCodec | KLCodec]
    prediction_type: str | None
    alphas_cumprod: torch.Tensor
    latent_scale: float | None = None


def missing_part(name: str, where: str) -> SubjectBoothError:
    """The error for a checkpoint without a text encoder or a VAE."""
    return SubjectBoothError(
        f"the checkpoint has no {name}", "a complete checkpoint", "use one that was saved with all its parts", where
    )


def stable_diffusion_schedule(
    zero_terminal_snr: bool = False,
    betas: torch.Tensor | None = None,
) -> torch.Tensor:
    """``alphas_cumprod``, float32 [timesteps].

    Args:
        zero_terminal_snr: rescale so that the last step is pure noise (arXiv 2305.08891, algorithm 1), except for the
            small remainder that ComfyUI leaves, too.
        betas: float64 [timesteps]; None for Stable Diffusion's, from 0.00085 to 0.012, linear in their square root.
    """
    if betas is None:
        betas = scaled_linear_betas(0.00085, 0.012, 1000)
    alphas = torch.cumprod(1.0 - betas, dim=0)
    if zero_terminal_snr:
        root = alphas.sqrt()
        alphas = ((root - root[-1]) * root[0] / (root[0] - root[-1])) ** 2
        alphas[-1] = 4.8973451890853435e-08
    return alphas.float()


def scaled_linear_betas(first: float, last: float, timesteps: int) -> torch.Tensor:
    """float64 [timesteps], linear in their square root."""
    return torch.linspace(first**0.5, last**0.5, timesteps, dtype=torch.float64) ** 2
