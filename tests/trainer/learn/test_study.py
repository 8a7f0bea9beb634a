"""What is learned about the base before training."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch

from subjectbooth.tests.toy_base import Flow, toy_base
from subjectbooth.trainer.config import TrainConfig
from subjectbooth.trainer.events import StepDone, Studying
from subjectbooth.trainer.learn.data import TrainingData, make_study_batch
from subjectbooth.trainer.learn.loop import Training
from subjectbooth.trainer.machine.draws import generator_for
from subjectbooth.trainer.preserve.adapter_layer import AdapterLayer
from subjectbooth.trainer.preserve.curvature import Curvature
from subjectbooth.trainer.preserve.curvature_estimate import RANK, CurvatureEstimate, SecondMomentSketch

CPU = torch.device("cpu")
CONFIG = TrainConfig(steps=1, learning_rate=1e-2, rank=2, network_alpha=4.0, resolution=64, train_batch_size=2)
IMAGES = 12


def _data() -> TrainingData:
    base, way = toy_base(), Curvature("dog", images=IMAGES)
    latents = torch.randn(3, *base.denoiser.latent_size(64, 64), generator=torch.Generator().manual_seed(1))
    prompts = ["a photo of ohwx dog", *way.prompts]
    return TrainingData(latents, (prompts[0],) * 3, dict(zip(prompts, base.prompts.encode(prompts), strict=True)), way)


def _studied(micro_batch: int = 0) -> tuple[dict[str, torch.Tensor], list[Studying]]:
    config = replace(CONFIG, pictures_per_forward=micro_batch)
    with Training(toy_base(), _data(), config, device=CPU) as training:
        events = list(training.events())
        assert training.studied is not None
        return dict(training.studied), [event for event in events if isinstance(event, Studying)]


def test_the_matrices_are_those_of_inputs_and_of_gradients() -> None:
    studied, progress = _studied()
    assert (progress[-1].done, progress[-1].total) == (IMAGES, IMAGES)
    network, data = Flow().build(torch.float32), _data()
    inputs: list[list[torch.Tensor]] = [[], []]
    gradients: list[torch.Tensor] = [torch.zeros(16, 16), torch.zeros(3, 3)]
    for number in range(IMAGES):
        batch = make_study_batch(data, CONFIG.seed, Flow(), [number], CPU)
        noisy = Flow().noisy_latents(batch.latents, batch.noise, batch.times)
        pixels = noisy[0].flatten(1).T
        more = torch.cat([batch.times.float(), batch.conditioning.hidden_states[0].mean(0)])
        x = torch.cat([pixels, more.expand(len(pixels), -1)], dim=1)
        hidden = torch.tanh(network.first(x))
        probe = torch.randn(batch.latents.shape[1:], generator=generator_for(CONFIG.seed, "probe", number))
        g_2 = probe.flatten(1).T
        g_1 = (g_2 @ network.second.weight) * (1 - hidden**2)
        inputs[0].append(x)
        inputs[1].append(hidden)
        gradients[0] += g_1.T @ g_1 / IMAGES / probe.numel()
        gradients[1] += g_2.T @ g_2 / IMAGES / probe.numel()
    for number in (0, 1):
        rows = torch.cat(inputs[number])
        for kind, wanted in (("inputs", rows.T @ rows / len(rows)), ("outputs", gradients[number])):
            root = studied[f"{number}.{kind}"][0]
            torch.testing.assert_close(root @ root.T, wanted, rtol=1e-3, atol=1e-4 * float(wanted.diagonal().max()))


def test_the_estimate_is_calibrated_to_a_measured_change() -> None:
    """A change of one layer, alone and small, is nearly quadratic; the calibration brings it to the right size."""
    studied, _ = _studied()
    estimate = CurvatureEstimate.from_tensors(studied, CPU)
    assert 1.0 < estimate.factor < 60.0  # at least that of independent layers and pixels, at most of 256 equal ones
    layers = [
        AdapterLayer(torch.randn(2, width), 0.01 * torch.randn(after, 2), 1.0) for width, after in ((20, 16), (16, 3))
    ]
    one = float(estimate.change(layers))
    twice = [replace(layer, up=2 * layer.up) for layer in layers]
    assert float(estimate.change(twice)) == pytest.approx(4 * one, rel=1e-5)
    assert float(estimate.calibrated(1.0).change(layers)) == pytest.approx(one / estimate.factor, rel=1e-5)
    # Those of a frozen text encoder, at the end, may be missing.
    assert 0 < float(estimate.change(layers[:1])) < one


def test_the_micro_batch_does_not_matter() -> None:
    together, alone = (_studied(micro_batch)[0] for micro_batch in (0, 1))
    for name, tensor in together.items():
        torch.testing.assert_close(tensor, alone[name], rtol=1e-2, atol=1e-3)


def test_a_sketch_keeps_the_large_directions_and_spreads_the_rest() -> None:
    random = torch.Generator().manual_seed(0)
    width, scales = 200, torch.cat([torch.full((20,), 10.0), torch.full((180,), 0.1)])
    directions = torch.linalg.qr(torch.randn(width, width, generator=random)).Q
    rows = torch.randn(4000, width, generator=random) * scales @ directions.T
    sketch = SecondMomentSketch(width, CPU)
    for part in rows.split(500):
        sketch.add(part)
    found = sketch.finish(1 / len(rows))
    exact = rows.T @ rows / len(rows)
    assert found.root.shape == (width, RANK)
    matrix = found.root @ found.root.T + found.rest * torch.eye(width)
    torch.testing.assert_close(matrix.trace(), exact.trace(), rtol=1e-3, atol=0.0)
    assert float((matrix - exact).norm() / exact.norm()) < 1e-3


def test_studying_leaves_the_adapter_as_it_was() -> None:
    """Its own weights are replaced for the calibration."""
    with Training(toy_base(), _data(), CONFIG, device=CPU) as training:
        events = training.events()
        next(events)
        state = training._assembly
        assert state is not None
        before = [parameter.detach().clone() for parameter in state.parameters]
        gradients: list[torch.Tensor] = []
        step = state.optimizer.step
        state.optimizer.step = lambda: (gradients.extend(p.detach().clone() for p in state.parameters), step())[1]
        next(event for event in events if isinstance(event, StepDone))
    assert all(map(torch.equal, before, gradients))


def test_the_plan_counts_what_is_kept() -> None:
    with Training(toy_base(), _data(), CONFIG, device=CPU) as training:
        plan = training.plan()
    studied, _ = _studied()
    kept = sum(tensor.nbytes for name, tensor in studied.items() if name[-7:] not in ("numbers", "factor"))
    assert kept == plan.preservation > 0
    assert "class preservation" in plan.sentence


def test_checkpointing_and_half_precision_learn_the_same() -> None:
    """Blocks run again in the backward pass, and hooks run inside autocast."""
    from subjectbooth.tests.small_base import small_base

    base = small_base()
    way = Curvature("dog", images=4)
    latents = torch.randn(3, *base.denoiser.latent_size(64, 64), generator=torch.Generator().manual_seed(1))
    prompts = ["a photo of ohwx dog", *way.prompts]
    encoded = dict(zip(prompts, base.prompts.encode(prompts), strict=True))
    data = TrainingData(latents, (prompts[0],) * 3, encoded, way)

    def studied(**changes: str) -> dict[str, torch.Tensor]:
        with Training(base, data, replace(CONFIG, **changes), device=CPU) as training:
            next(event for event in training.events() if isinstance(event, StepDone))
            assert training.studied is not None
            return dict(training.studied)

    whole = studied(gradient_checkpointing="off", precision="fp32")
    for changes, tolerance in (
        ({"gradient_checkpointing": "on", "precision": "fp32"}, 1e-3),
        ({"precision": "bf16"}, 0.1),
    ):
        other = studied(**changes)
        for name in whole:
            if name.endswith(("inputs", "outputs")):
                energy, other_energy = (values[name].square().sum() for values in (whole, other))
                torch.testing.assert_close(other_energy, energy, rtol=tolerance, atol=0.0)
        assert float(other["factor"]) == pytest.approx(float(whole["factor"]), rel=10 * tolerance)
