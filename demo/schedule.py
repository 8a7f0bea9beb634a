"""Stable Diffusion's noise schedule, and a plain DDIM sampler for the narrow model (used to look at it)."""

from __future__ import annotations

import torch

from .text import TextEncoder
from .unet import UNet
from .words import token_ids

STEPS = 1000


def alphas_cumprod() -> torch.Tensor:
    """float32 [1000], SD 1.5's 'scaled linear' betas from 0.00085 to 0.012."""
    betas = torch.linspace(0.00085**0.5, 0.012**0.5, STEPS, dtype=torch.float64) ** 2
    return torch.cumprod(1 - betas, 0).float()


@torch.no_grad()
def sample(
    unet: UNet, text: TextEncoder, captions: list[str], seed: int, steps: int = 30, cfg: float = 4.0
) -> torch.Tensor:
    """Latents [n, 4, 8, 8] for *captions* by DDIM (Song et al. 2021, eta 0) with classifier-free guidance."""
    alphas = alphas_cumprod()
    context = text(token_ids([""] * len(captions) + captions))
    x = torch.randn(len(captions), 4, 8, 8, generator=torch.Generator().manual_seed(seed))
    times = torch.linspace(STEPS - 1, 0, steps + 1).round().long()[:-1]
    for i, time in enumerate(times):
        both = unet(torch.cat([x, x]), time.expand(2 * len(x)), context)
        without, with_caption = both.chunk(2)
        eps = without + cfg * (with_caption - without)
        now = alphas[time]
        then = alphas[times[i + 1]] if i + 1 < len(times) else torch.tensor(1.0)
        x0 = (x - (1 - now).sqrt() * eps) / now.sqrt()
        x = then.sqrt() * x0 + (1 - then).sqrt() * eps
    return x
