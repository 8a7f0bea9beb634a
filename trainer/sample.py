"""Validation pictures: DDIM on the trainer's own UNet, with its own random state, so that looking changes nothing."""

from __future__ import annotations

from collections.abc import Generator
from typing import TYPE_CHECKING, Any

import torch

from .base_model import predict
from .conditioning import Conditioning, concatenate

if TYPE_CHECKING:
    from diffusers import DDIMScheduler, DDPMScheduler


def ddim_from(noise_scheduler: DDPMScheduler) -> DDIMScheduler:
    """A sampler (DDIM, arXiv 2010.02502) on exactly the training's noise schedule."""
    from diffusers import DDIMScheduler

    sampler = DDIMScheduler(
        num_train_timesteps=len(noise_scheduler.alphas_cumprod), clip_sample=False, set_alpha_to_one=True,
        prediction_type=noise_scheduler.config["prediction_type"], timestep_spacing="trailing")
    sampler.alphas_cumprod = noise_scheduler.alphas_cumprod.clone()
    return sampler


def sample(
    unet: Any, noise_scheduler: DDPMScheduler, prompt: Conditioning, negative: Conditioning,
    shape: tuple[int, ...], steps: int, guidance_scale: float, seed: int, device: torch.device,
) -> Generator[int, None, torch.Tensor]:
    """Draw one picture's latents with classifier-free guidance (arXiv 2207.12598).

    Args:
        prompt, negative: batch size 1.
        shape: (4, h/8, w/8).
        seed: of the first noise; the same seed gives the same noise at every step of a training.

    Yields:
        denoising steps done, 1..steps.

    Returns:
        latents, float32 [1, 4, h/8, w/8], on the CPU, in the training space.
    """
    sampler = ddim_from(noise_scheduler)
    sampler.set_timesteps(steps)
    both = concatenate([prompt, negative]).to(device)
    latents = torch.randn((1, *shape), generator=torch.Generator("cpu").manual_seed(seed)).to(device)
    was_training = unet.training
    unet.eval()
    try:
        for number, timestep in enumerate(sampler.timesteps, start=1):
            with torch.no_grad():
                noisy = torch.cat([latents, latents])
                output = predict(unet, noisy, timestep.repeat(2).to(device), both)
                positive, unconditional = output.chunk(2)
                guided = unconditional + guidance_scale * (positive - unconditional)
                latents = sampler.step(guided, int(timestep), latents, eta=0.0, return_dict=False)[0]
            yield number
    finally:
        unet.train(was_training)
    return latents.float().cpu()
