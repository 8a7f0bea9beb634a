"""The arithmetic is DreamBooth's: compared with a computation written out by hand."""

from __future__ import annotations

import pytest
import torch

from subjectbooth.tests.small_base import alphas_cumprod, small_base, small_denoiser, small_unet, with_lora
from subjectbooth.trainer.base.conditioning import EncodedText, concatenate
from subjectbooth.trainer.config import TrainConfig
from subjectbooth.trainer.learn import adapter
from subjectbooth.trainer.learn.batch import Batch, Term
from subjectbooth.trainer.learn.loss import batch_losses


def _batch(instances: int, classes: int) -> Batch:
    random = torch.Generator().manual_seed(3)
    count = instances + classes
    return Batch(
        latents=torch.randn(count, 4, 8, 8, generator=random),
        noise=torch.randn(count, 4, 8, 8, generator=random),
        times=torch.tensor([10, 300, 700, 990][:count]),
        conditioning=EncodedText(torch.randn(count, 77, 16, generator=random)),
        losses=("instance_loss",) * instances + ("prior_loss",) * classes,
    )


def _by_hand(unet: torch.nn.Module, batch: Batch, prediction_type: str, weight: float) -> tuple[torch.Tensor, ...]:
    alphas = alphas_cumprod()
    parts: list[list[torch.Tensor]] = [[], []]
    for index in range(len(batch.latents)):  # one picture at a time, so that no batching can hide a mistake
        latents, noise = batch.latents[index], batch.noise[index]
        alpha = alphas[batch.times[index]]
        noisy = alpha.sqrt() * latents + (1 - alpha).sqrt() * noise
        target = noise if prediction_type == "epsilon" else alpha.sqrt() * noise - (1 - alpha).sqrt() * latents
        output = unet(noisy[None], batch.times[index], batch.conditioning.hidden_states[index][None]).sample[0]
        parts[batch.losses[index] == "prior_loss"].append(((output - target) ** 2).mean())
    instance, prior = (torch.stack(part).mean() if part else torch.zeros(()) for part in parts)
    return instance + weight * prior, instance, prior


@pytest.mark.parametrize("prediction_type", ["epsilon", "v_prediction"])
@pytest.mark.parametrize(("instances", "classes", "weight"), [(2, 0, 1.0), (2, 2, 1.0), (1, 2, 0.3)])
def test_losses_and_gradients_equal_a_computation_by_hand(
    prediction_type: str, instances: int, classes: int, weight: float
) -> None:
    base = small_base(prediction_type)
    unet = small_unet()
    parameters = with_lora(unet, TrainConfig(rank=4, network_alpha=2.0, seed=7))
    with torch.no_grad():  # B starts at 0, and then half of all gradients are 0 as well
        for number, parameter in enumerate(parameters):
            parameter += 0.05 * torch.randn(parameter.shape, generator=torch.Generator().manual_seed(number))
    batch = _batch(instances, classes)

    terms = [Term("instance_loss", 1.0, instances)] + [Term("prior_loss", weight, classes)] * bool(classes)
    losses = batch_losses(base.denoiser, unet, batch, terms)
    ours = torch.autograd.grad(losses.total, parameters)
    total, instance, prior = _by_hand(unet, batch, prediction_type, weight)
    theirs = torch.autograd.grad(total, parameters)

    torch.testing.assert_close(losses.total, total, rtol=1e-5, atol=1e-6)
    torch.testing.assert_close(losses.terms["instance_loss"], instance.detach(), rtol=1e-5, atol=1e-6)
    if classes:
        torch.testing.assert_close(losses.terms["prior_loss"], prior.detach(), rtol=1e-5, atol=1e-6)
    else:
        assert "prior_loss" not in losses.terms
    assert max(float(gradient.abs().max()) for gradient in theirs) > 1e-4
    for mine, other in zip(ours, theirs, strict=True):
        torch.testing.assert_close(mine, other, rtol=1e-4, atol=1e-7)


def test_a_lora_layer_is_base_plus_alpha_over_rank_times_up_down() -> None:
    plain, tuned = small_unet(), small_unet()
    with_lora(tuned, TrainConfig(rank=4, network_alpha=2.0, seed=7))
    state = {
        name: torch.randn(tensor.shape, generator=torch.Generator().manual_seed(1))
        for name, tensor in adapter.adapter_state(tuned).items()
    }
    adapter.load_adapter_state(tuned, state)
    kohya = adapter.to_file(state, small_denoiser().file_key, 2.0)
    for name, layer in plain.named_modules():
        key = f"lora_unet_{name.replace('.', '_')}"
        if f"{key}.lora_up.weight" in kohya:
            scale = kohya[f"{key}.alpha"] / 4
            with torch.no_grad():
                layer.weight += scale * kohya[f"{key}.lora_up.weight"] @ kohya[f"{key}.lora_down.weight"]
    batch = _batch(2, 0)
    expected = plain(batch.latents, batch.times, batch.conditioning.hidden_states).sample
    found = tuned(batch.latents, batch.times, batch.conditioning.hidden_states).sample
    torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-4)
    untuned = small_unet()(batch.latents, batch.times, batch.conditioning.hidden_states).sample
    assert float((found - untuned).detach().abs().max()) > 0.1


def test_a_prompt_of_one_chunk_means_the_same_beside_one_of_two() -> None:
    unet = small_unet()
    random = torch.Generator().manual_seed(2)
    short = EncodedText(torch.randn(1, 77, 16, generator=random))
    long = EncodedText(torch.randn(1, 154, 16, generator=random))
    latents = torch.randn(2, 4, 8, 8, generator=random)
    together = unet(latents, 500, concatenate([short, long]).hidden_states).sample
    torch.testing.assert_close(together[:1], unet(latents[:1], 500, short.hidden_states).sample, rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(together[1:], unet(latents[1:], 500, long.hidden_states).sample, rtol=1e-4, atol=1e-5)
