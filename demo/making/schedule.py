"""Stable Diffusion's noise schedule, and ComfyUI's `euler` sampler with the `normal` schedule for the narrow model.

The narrow model is sampled exactly as ComfyUI samples the wide one: the same seed gives the same image.
"""

from __future__ import annotations

import torch

from .text import TextEncoder
from .unet import UNet
from .words import token_ids

STEPS = 1000
SIDE = 8
"""Side of the latents of a 64-pixel image."""


def alphas_cumprod() -> torch.Tensor:
    """float32 [1000], SD 1.5's 'scaled linear' betas from 0.00085 to 0.012."""
    betas = torch.linspace(0.00085**0.5, 0.012**0.5, STEPS, dtype=torch.float64) ** 2
    return torch.cumprod(1 - betas, 0).float()


def noise_levels() -> torch.Tensor:
    """float32 [1000]: sigma at each time step, the standard deviation of the noise on unscaled latents."""
    alphas = alphas_cumprod()
    return ((1 - alphas) / alphas).sqrt()


def normal_sigmas(steps: int) -> torch.Tensor:
    """float32 [steps + 1]: noise levels at evenly spaced time steps from 999 to 0, then 0."""
    log_sigmas = noise_levels().log()
    times = torch.linspace(STEPS - 1, 0, steps)
    low = times.floor().long()
    part = times - low
    between = (1 - part) * log_sigmas[low] + part * log_sigmas[(low + 1).clamp(max=STEPS - 1)]
    return torch.cat([between.exp(), torch.zeros(1)])


def starting_noise(seeds: list[int]) -> torch.Tensor:
    """float32 [n, 4, 8, 8]: KSampler's initial noise, one seed per image."""
    return torch.cat([torch.randn(1, 4, SIDE, SIDE, generator=torch.Generator().manual_seed(s)) for s in seeds])


@torch.no_grad()
def sample(
    unet: UNet, text: TextEncoder, captions: list[str], seeds: list[int], steps: int = 30, cfg: float = 4.0
) -> torch.Tensor:
    """Sample latents [n, 4, 8, 8] for *captions* with the Euler sampler and classifier-free guidance."""
    sigmas = normal_sigmas(steps)
    levels = noise_levels().log()
    context = text(token_ids([""] + captions))
    context = torch.cat([context[:1].expand(len(captions), -1, -1), context[1:]])
    x = starting_noise(seeds) * (1 + sigmas[0] ** 2).sqrt()
    for sigma, after in zip(sigmas[:-1], sigmas[1:], strict=True):
        scaled = x / (sigma**2 + 1).sqrt()
        time = (sigma.log() - levels).abs().argmin()
        without, with_caption = unet(torch.cat([scaled, scaled]), time.expand(2 * len(x)), context).chunk(2)
        x = x + (without + cfg * (with_caption - without)) * (after - sigma)
    return x
