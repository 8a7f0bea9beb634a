"""What of a photo's details the base keeps: noising and denoising against nets whose answer is known."""

from __future__ import annotations

import dataclasses
from typing import Any

import pytest
import torch

from subjectbooth.demo.making.gain import NOISED_TO, noised_and_denoised
from subjectbooth.demo.making.narrow import load_narrow
from subjectbooth.demo.making.schedule import alphas_cumprod

LEVELS = ((1 - alphas_cumprod()) / alphas_cumprod()).sqrt()


def _there_and_back(unet: Any, latents: torch.Tensor, step: int) -> torch.Tensor:
    nets = dataclasses.replace(load_narrow(), unet=unet)
    return noised_and_denoised(nets, latents, "a photo of a dog", step)


@pytest.mark.parametrize("step", NOISED_TO)
def test_a_net_that_knows_the_noise_gives_the_latents_back(step: int) -> None:
    latents = torch.randn(3, 4, 8, 8, generator=torch.Generator().manual_seed(0))

    def knows(x: torch.Tensor, time: torch.Tensor, context: torch.Tensor) -> torch.Tensor:
        sigma = LEVELS[time].view(-1, 1, 1, 1)
        return (x * (sigma**2 + 1).sqrt() - latents) / sigma

    torch.testing.assert_close(_there_and_back(knows, latents, step), latents, rtol=1e-4, atol=1e-4)


def test_a_net_that_sees_no_noise_leaves_all_of_it() -> None:
    latents = torch.randn(3, 4, 8, 8, generator=torch.Generator().manual_seed(0))
    left = _there_and_back(lambda x, time, context: torch.zeros_like(x), latents, 100) - latents
    assert float(left.std() / LEVELS[100]) == pytest.approx(1.0, abs=0.1)
