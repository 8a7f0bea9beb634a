"""The narrow model as a base that predicts v."""

from __future__ import annotations

import pytest
import torch

from subjectbooth.demo.making import narrow_v
from subjectbooth.demo.making.classes import caption
from subjectbooth.demo.making.narrow import load_narrow
from subjectbooth.demo.making.schedule import alphas_cumprod
from subjectbooth.demo.making.words import token_ids
from subjectbooth.trainer.base.sd.sample import ddim_from
from subjectbooth.trainer.base.sd.schedule import make_noise_scheduler, min_snr_weights, prediction_target
from subjectbooth.trainer.base.stored.parts import stable_diffusion_schedule


def test_schedules_are_the_trainers() -> None:
    assert torch.allclose(narrow_v.levels_of("v"), stable_diffusion_schedule(), rtol=1e-5)
    assert torch.allclose(narrow_v.levels_of("v-zero-snr"), stable_diffusion_schedule(True), rtol=1e-4, atol=1e-9)


def test_times_with_the_same_noise() -> None:
    alphas = alphas_cumprod()
    assert torch.allclose(narrow_v.base_times(alphas), torch.arange(1000.0), atol=0.05)
    between = narrow_v.base_times((alphas[500:501].log() + alphas[501:502].log()).div(2).exp())
    assert 500.4 < float(between) < 500.6
    assert float(narrow_v.base_times(narrow_v.levels_of("v-zero-snr"))[-1]) == 999  # there is no more


def test_with_min_snr_v_has_the_losses_of_eps() -> None:
    """The v error is the eps error over sqrt(alphas_cumprod), which min-SNR's v form cancels."""
    torch.manual_seed(0)
    times = torch.tensor([5, 300, 700, 999])
    eps, v = (make_noise_scheduler(alphas_cumprod(), kind) for kind in ("epsilon", "v_prediction"))
    latents, noise = torch.randn(4, 4, 8, 8), torch.randn(4, 4, 8, 8)
    noisy, context = eps.add_noise(latents, noise, times), torch.randn(4, 77, 96)
    losses = []
    for scheduler, nets in ((eps, load_narrow()), (v, narrow_v.load_copy("v"))):
        errors = nets.unet(noisy, times, context) - prediction_target(scheduler, latents, noise, times)
        losses.append(errors.square().mean((1, 2, 3)) * min_snr_weights(scheduler, times, 5.0))
    assert torch.allclose(*losses, rtol=1e-3)


@pytest.mark.parametrize(("name", "most"), [("v", 1e-3), ("v-zero-snr", 0.05)])
def test_it_draws_what_the_base_draws(name: str, most: float) -> None:
    """From the same noise; the pictures of two seeds differ by 0.14. With zero terminal SNR the steps are others."""
    nets, made = load_narrow(), narrow_v.load_copy(name)
    context = nets.text(token_ids([caption("dog", "beach")]))
    start = torch.randn(1, 4, 8, 8, generator=torch.Generator().manual_seed(0))
    pictures = []
    for unet, levels, kind in (
        (nets.unet, alphas_cumprod(), "epsilon"),
        (made.unet, narrow_v.levels_of(name), "v_prediction"),
    ):
        sampler = ddim_from(make_noise_scheduler(levels, kind))
        sampler.set_timesteps(20)
        latents = start
        for time in sampler.timesteps:
            with torch.no_grad():
                output = unet(latents, time.repeat(1), context)
            latents = sampler.step(output, int(time), latents, eta=0.0, return_dict=False)[0]
        pictures.append(nets.decoder(latents).clamp(0, 1))
    assert float((pictures[0] - pictures[1]).abs().mean()) < most
