"""The narrow model as a base that predicts v, for experiments/another_base.toml: the same weights and pictures.

Nothing is trained: the noise that the UNet predicts is converted to v, so only the parameterisation differs.
"""

from __future__ import annotations

from dataclasses import replace

import torch

from .narrow import Narrow, load_narrow
from .schedule import STEPS, alphas_cumprod, noise_levels
from .unet import UNet

COPIES = ("v", "v-zero-snr")
"""On the base's noise schedule; on that schedule rescaled to zero terminal SNR."""

REST = 4.8973451890853435e-08
"""What ComfyUI and trainer/base/stored/parts.py leave of the picture at the last time of zero terminal SNR."""


def levels_of(name: str) -> torch.Tensor:
    """float32 [1000]: ``alphas_cumprod`` of a copy's noise schedule (arXiv 2305.08891, algorithm 1)."""
    alphas = alphas_cumprod()
    if name == "v":
        return alphas
    root = alphas.double().sqrt()
    alphas = ((root - root[-1]) * root[0] / (root[0] - root[-1])) ** 2
    alphas[-1] = REST
    return alphas.float()


def base_times(levels: torch.Tensor) -> torch.Tensor:
    """The times, with fractions, at which the base's schedule has as much noise, or the most that it has.

    Args:
        levels: ``alphas_cumprod`` of the other schedule, float32 [n].
    """
    wanted = ((1 - levels.double()) / levels.double()).sqrt().log()
    known = noise_levels().double().log()
    above = torch.searchsorted(known, wanted).clamp(1, STEPS - 1)
    part = (wanted - known[above - 1]) / (known[above] - known[above - 1])
    return (above - 1 + part).clamp(0, STEPS - 1).float()


class UNetOfV(UNet):
    """The narrow UNet with v (arXiv 2202.00512) as its output. The layers and their names are the same.

    Args:
        levels: ``alphas_cumprod`` of its noise schedule, float32 [1000]. Where there is more noise than the base has
            seen, it is shown the latents as if they had the most that it has.
    """

    def __init__(self, levels: torch.Tensor) -> None:
        super().__init__()
        self.register_buffer("levels", levels, persistent=False)
        self.register_buffer("times", base_times(levels), persistent=False)
        self.register_buffer("base_levels", levels.clamp(min=float(alphas_cumprod()[-1])), persistent=False)

    def forward(self, x: torch.Tensor, steps: torch.Tensor, context: torch.Tensor) -> torch.Tensor:
        assert isinstance(self.levels, torch.Tensor) and isinstance(self.base_levels, torch.Tensor)
        assert isinstance(self.times, torch.Tensor)
        steps = steps.long()
        level, base_level = (table[steps].view(-1, 1, 1, 1) for table in (self.levels, self.base_levels))
        eps = super().forward(x, self.times[steps], context)
        picture = (x - (1 - base_level).sqrt() * eps) / base_level.sqrt()
        return (level.sqrt() * x - picture) / (1 - level).sqrt()


def load_copy(name: str) -> Narrow:
    """The narrow model as one of :data:`COPIES`."""
    nets = load_narrow()
    unet = UNetOfV(levels_of(name))
    unet.load_state_dict(nets.unet.state_dict())
    return replace(nets, unet=unet.eval().requires_grad_(False))
