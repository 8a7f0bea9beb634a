"""DDIM sampling with the trained UNet, with separate random generators, so that sampling never affects training."""

from __future__ import annotations

from collections.abc import Generator, Sequence
from typing import TYPE_CHECKING, Any

import torch

from ..conditioning import Conditioning, concatenate, encoded_text
from .unet import predict

if TYPE_CHECKING:
    from diffusers import DDIMScheduler, DDPMScheduler


def ddim_from(noise_scheduler: DDPMScheduler) -> DDIMScheduler:
    """A DDIM sampler (arXiv 2010.02502) with the noise schedule of the training."""
    from diffusers import DDIMScheduler

    sampler = DDIMScheduler(
        num_train_timesteps=len(noise_scheduler.alphas_cumprod),
        clip_sample=False,
        set_alpha_to_one=True,
        prediction_type=noise_scheduler.config["prediction_type"],
        timestep_spacing="trailing",
    )
    sampler.alphas_cumprod = noise_scheduler.alphas_cumprod.clone()
    return sampler


def sample(
    unet: Any,
    noise_scheduler: DDPMScheduler,
    prompts: Conditioning,
    negative: Conditioning,
    shape: tuple[int, ...],
    steps: int,
    guidance_scale: float,
    seeds: Sequence[int],
    device: torch.device,
) -> Generator[int, None, torch.Tensor]:
    """Sample latents in one batch with classifier-free guidance (arXiv 2207.12598).

    Args:
        prompts: one per image, or one for all.
        negative: for all images, batch size 1.
        shape: (4, h/8, w/8).
        seeds: seed of each image's initial noise; it does not depend on the training step or the batch.

    Yields:
        denoising steps done, 1..steps.

    Returns:
        latents, float32 [n, 4, h/8, w/8], on the CPU, scaled for the UNet.
    """
    count = len(seeds)
    sampler = ddim_from(noise_scheduler)
    sampler.set_timesteps(steps)
    if len(encoded_text(prompts).hidden_states) < count:
        prompts = concatenate([prompts] * count)
    both = concatenate([prompts, *[negative] * count]).to(device)
    latents = torch.cat(
        [
            torch.randn(
                (1, *shape), generator=torch.Generator("cpu").manual_seed(seed), dtype=torch.float32, device="cpu"
            )
            for seed in seeds
        ]
    ).to(device)
    was_training = unet.training
    unet.eval()
    try:
        for number, timestep in enumerate(sampler.timesteps, start=1):
            with torch.no_grad():
                noisy = torch.cat([latents, latents])
                output = predict(unet, noisy, timestep.repeat(2 * count).to(device), both)
                positive, unconditional = output.chunk(2)
                guided = unconditional + guidance_scale * (positive - unconditional)
                latents = sampler.step(guided, int(timestep), latents, eta=0.0, return_dict=False)[0]
            yield number
    finally:
        unet.train(was_training)
    return latents.float().cpu()
