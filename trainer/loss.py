"""One step's arithmetic (DreamBooth: arXiv 2208.12242, equation 2)."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from torch.nn.functional import mse_loss

from .base_model import predict
from .conditioning import Conditioning

if TYPE_CHECKING:
    from diffusers import DDPMScheduler


@dataclass(frozen=True)
class Batch:
    """Photos and, behind them, class images.

    Attributes:
        latents: float32 [b, 4, h/8, w/8], in the training space.
        noise: like ``latents``, standard normal.
        timesteps: int64 [b].
        conditioning: b prompts.
        instances: how many of the b, from the front, are photos; the others are class images.
    """

    latents: torch.Tensor
    noise: torch.Tensor
    timesteps: torch.Tensor
    conditioning: Conditioning
    instances: int


@dataclass(frozen=True)
class Losses:
    """Scalars; ``total`` carries the graph for the backward pass."""

    total: torch.Tensor
    instance: torch.Tensor
    prior: torch.Tensor | None


def prediction_target(
    noise_scheduler: DDPMScheduler, latents: torch.Tensor, noise: torch.Tensor, timesteps: torch.Tensor,
) -> torch.Tensor:
    """What the UNet should say: the noise (DDPM, arXiv 2006.11239), or v = sqrt(a) noise - sqrt(1-a) x
    (arXiv 2202.00512), like ``latents``."""
    if noise_scheduler.config["prediction_type"] == "v_prediction":
        return noise_scheduler.get_velocity(latents, noise, timesteps)  # type: ignore[arg-type]
    return noise


def dreambooth_loss(
    prediction: torch.Tensor, target: torch.Tensor, instances: int, prior_loss_weight: float,
) -> Losses:
    """``mse(photos) + prior_loss_weight * mse(class images)``, each averaged over its own part of the batch.

    Args:
        prediction, target: float32 [b, 4, h/8, w/8]; the first ``instances`` are photos.
        instances: 1..b.
        prior_loss_weight: lambda of the paper.
    """
    instance = mse_loss(prediction[:instances], target[:instances])
    if instances == len(prediction):
        return Losses(instance, instance.detach(), None)
    prior = mse_loss(prediction[instances:], target[instances:])
    return Losses(instance + prior_loss_weight * prior, instance.detach(), prior.detach())


def batch_losses(unet: Any, noise_scheduler: DDPMScheduler, batch: Batch, prior_loss_weight: float) -> Losses:
    """Noise the batch, ask the UNet, compare. Photos and class images share one forward pass."""
    noisy_latents = noise_scheduler.add_noise(batch.latents, batch.noise, batch.timesteps)  # type: ignore[arg-type]
    prediction = predict(unet, noisy_latents, batch.timesteps, batch.conditioning)
    target = prediction_target(noise_scheduler, batch.latents, batch.noise, batch.timesteps)
    return dreambooth_loss(prediction, target, batch.instances, prior_loss_weight)
