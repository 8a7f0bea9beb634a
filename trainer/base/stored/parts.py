"""What the readers of a single file and of a diffusers folder give."""

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
    """What a checkpoint file or a diffusers folder holds, in the names that the trainer works with.

    Attributes:
        files: everything that decides what the base is.
        unet: in the layout of single files, without the prefix.
        text_encoders: for a family and a layer to take (ComfyUI's count), what reads each text encoder's weights, with
            transformers' names (``text_model.encoder...``).
        codec: makes the latent codec.
        prediction_type: what the checkpoint says of itself; None when it says nothing.
        alphas_cumprod: the noise schedule.
        latent_scale: of the codec, where the checkpoint says it itself.
    """

    files: tuple[Path, ...]
    unet: StoredTensors
    text_encoders: Callable[[Family, int | None], list[WeightsReader]]
    codec: Callable[[Family], TinyCodec | KLCodec]
    prediction_type: str | None
    alphas_cumprod: torch.Tensor
    latent_scale: float | None = None


def missing_part(name: str, where: str) -> SubjectBoothError:
    """What to say of a checkpoint without a text encoder or a VAE."""
    return SubjectBoothError(
        f"a checkpoint without a {name}", "a whole checkpoint", "use one that was saved with all its parts", where
    )


def stable_diffusion_schedule(
    zero_terminal_snr: bool = False,
    betas: torch.Tensor | None = None,
) -> torch.Tensor:
    """``alphas_cumprod``, float32 [timesteps].

    Args:
        zero_terminal_snr: rescale so that the last step is pure noise (arXiv 2305.08891, algorithm 1), but for the
            small remainder that ComfyUI leaves too.
        betas: float64 [timesteps]; None for Stable Diffusion's own, from 0.00085 to 0.012, linear in their square
            root.
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
