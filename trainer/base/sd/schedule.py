"""Stable Diffusion's noise: a DDPM schedule, with prediction of epsilon or v."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch

from ...errors import SubjectBoothError, require
from ...topics import Topic

if TYPE_CHECKING:
    from diffusers import DDPMScheduler

PREDICTION_TYPES = ("epsilon", "v_prediction")


def make_noise_scheduler(alphas_cumprod: torch.Tensor, prediction_type: str) -> DDPMScheduler:
    """A diffusers scheduler with this schedule.

    Args:
        alphas_cumprod: float32 [timesteps], the cumulative product of 1 - beta, as in DDPM (arXiv 2006.11239).
        prediction_type: ``epsilon`` or ``v_prediction``.

    Raises:
        SubjectBoothError: another prediction type (flow matching, EDM, x0).
    """
    require("diffusers")
    from diffusers import DDPMScheduler

    if prediction_type not in PREDICTION_TYPES:
        raise SubjectBoothError(
            f"the model predicts {prediction_type!r}",
            "epsilon or v_prediction",
            "use a Stable Diffusion checkpoint that predicts one of them",
            about=Topic.UNET,
        )
    scheduler = DDPMScheduler(
        num_train_timesteps=len(alphas_cumprod), prediction_type=prediction_type, clip_sample=False
    )
    alphas = alphas_cumprod.detach().to("cpu", torch.float32).clone()
    # alphas_cumprod defines the schedule (also with zero terminal SNR); betas and alphas are derived from it.
    scheduler.alphas_cumprod = alphas
    previous = torch.cat([torch.ones(1, dtype=torch.float32), alphas[:-1]])
    scheduler.alphas = alphas / previous
    scheduler.betas = 1.0 - scheduler.alphas
    return scheduler


def predicts_v(noise_scheduler: DDPMScheduler) -> bool:
    """Whether the network predicts v instead of noise."""
    return str(noise_scheduler.config["prediction_type"]) == "v_prediction"


def prediction_target(
    noise_scheduler: DDPMScheduler, latents: torch.Tensor, noise: torch.Tensor, timesteps: torch.Tensor
) -> torch.Tensor:
    """The training target, shaped like ``latents``: the noise (DDPM, arXiv 2006.11239), or
    ``v = sqrt(a) noise - sqrt(1 - a) x`` (arXiv 2202.00512)."""
    if predicts_v(noise_scheduler):
        return noise_scheduler.get_velocity(latents, noise, timesteps)  # type: ignore[arg-type]
    return noise


def min_snr_weights(noise_scheduler: DDPMScheduler, timesteps: torch.Tensor, snr_gamma: float) -> torch.Tensor:
    """``min(snr, gamma) / snr`` for epsilon, ``/ (snr + 1)`` for v, float32 [b] (arXiv 2303.09556, section 3.4).

    With zero terminal SNR the epsilon form is 0/0 at the last timestep; its limit, 1, is used.
    """
    alphas = noise_scheduler.alphas_cumprod.to(timesteps.device)[timesteps]
    snr = alphas / (1.0 - alphas)
    capped = snr.clamp(max=snr_gamma)
    if predicts_v(noise_scheduler):
        return capped / (snr + 1.0)
    return torch.where(snr > 0, capped / snr.clamp(min=1e-20), torch.ones_like(snr))
