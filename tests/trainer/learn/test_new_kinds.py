"""A new kind of network and a new way to keep the class need nothing of the trainer but what is written here.

The network is two linear layers under flow matching (arXiv 2209.03003); the way adds the base's own prediction for
another prompt as a target, and a penalty on the adapter's weights.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from subjectbooth.tests.small_base import small_subject
from subjectbooth.tests.toy_base import CHANNELS, Flow, toy_base
from subjectbooth.trainer.config import TrainConfig
from subjectbooth.trainer.events import CheckpointSaved, Event, Finished, StepDone, Validation, to_json
from subjectbooth.trainer.files.safetensors_file import read_metadata
from subjectbooth.trainer.learn import adapter
from subjectbooth.trainer.learn.data import TrainingData, make_micro_step
from subjectbooth.trainer.learn.loop import Training
from subjectbooth.trainer.machine.draws import Draws
from subjectbooth.trainer.preserve import ways
from subjectbooth.trainer.preserve.adapter_layer import AdapterLayer
from subjectbooth.trainer.preserve.curvature_estimate import CurvatureEstimate
from subjectbooth.trainer.preserve.preservation import Part, Preservation
from subjectbooth.trainer.preserve.priors import ClassPriors
from subjectbooth.trainer.runs.history import curve_points
from subjectbooth.trainer.runs.run import Run

CPU = torch.device("cpu")
CONFIG = TrainConfig(
    steps=6,
    learning_rate=1e-2,
    rank=2,
    network_alpha=2.0,
    resolution=64,
    train_batch_size=2,
    prior_loss_weight=0.7,
    validation_prompts=("a photo of {subject}",),
    validation_interval=3,
    validation_steps=2,
    checkpoint_seconds=0.0,
)


class Toy(Preservation):
    """The base's prediction for other words on the photos' own noisy latents, and a penalty on ``up @ down``."""

    name = "toy"
    losses: Mapping[str, str] = {"toy_loss": "toy", "norm_loss": "norm"}
    key = "toy 1"
    prompts = ("a photo of a dog",)

    @classmethod
    def create(cls, class_word: str, priors: ClassPriors | None) -> Preservation:
        return cls()

    def pictures(self, photos: int) -> int:
        return photos

    def parts(self, photos: Part, draws: Draws, weight: float) -> Sequence[Part]:
        count = len(photos.latents)
        part = Part("toy_loss", weight, photos.latents, self.prompts * count, ("toy",) * count, photos.purpose)
        return [replace(part, from_base=True, like=photos)]

    def penalty(
        self, layers: Sequence[AdapterLayer], weight: float, estimate: CurvatureEstimate | None
    ) -> Mapping[str, torch.Tensor]:
        return {"norm_loss": torch.stack([(x.scale * x.up @ x.down).square().sum() for x in layers]).sum() * weight}


@pytest.fixture(autouse=True)
def _registered(monkeypatch: pytest.MonkeyPatch) -> None:
    way: type[Preservation] = Toy
    monkeypatch.setitem(ways.WAYS, Toy.name, way)


def _train(root: Path, stop_at: int = 0) -> tuple[list[Event], Path]:
    """The events of a run, up to the checkpoint of a step; and its folder."""
    run = Run(toy_base(), small_subject(), Toy(), CONFIG, root, CPU)
    told = []
    for event in run.events():
        told.append(event)
        if isinstance(event, CheckpointSaved) and event.step == stop_at:
            break
    return told, run.folder.path


def test_a_run_learns_draws_resumes_and_writes_its_file(tmp_path: Path) -> None:
    whole, folder = _train(tmp_path / "whole")
    steps = [event for event in whole if isinstance(event, StepDone)]
    assert len(steps) == 6 and all(set(step.losses) == {"instance_loss", "toy_loss", "norm_loss"} for step in steps)
    assert steps[-1].losses["norm_loss"] > 0
    pictures = [event.images for event in whole if isinstance(event, Validation)]
    assert [tuple(images.shape) for images in pictures] == [(1, 64, 64, 3)] * 2
    assert not torch.equal(*pictures)
    assert isinstance(whole[-1], Finished)
    assert read_metadata(whole[-1].path)["modelspec.architecture"] == "toy/lora"

    _train(tmp_path / "cut", stop_at=2)
    resumed, _ = _train(tmp_path / "cut")
    assert [event.step for event in resumed if isinstance(event, StepDone)] == [3, 4, 5, 6]
    (name,) = {path.name for path in folder.glob("lora_000006.safetensors")}
    again = next((tmp_path / "cut").glob(f"*/{name}"))
    assert _tensors(again) == _tensors(folder / name)


def _tensors(path: Path) -> dict[str, list[float]]:
    import safetensors.torch

    found = safetensors.torch.load_file(path)
    assert set(found) == {
        f"lora_unet_toy_{layer}.{part}"
        for layer in ("first", "second")
        for part in ("lora_down.weight", "lora_up.weight", "alpha")
    }
    return {name: tensor.flatten().tolist() for name, tensor in found.items()}


def test_one_step_equals_a_computation_by_hand() -> None:
    """Loss and gradient of a step from an adapter that is not zero."""
    base, way, flow = toy_base(), Toy(), Flow()
    prompts = ["a photo of ohwx dog", *way.prompts, ""]
    encoded = dict(zip(prompts, base.prompts.encode(prompts), strict=True))
    latents = torch.randn(3, CHANNELS, 16, 16, generator=torch.Generator().manual_seed(1))
    data = TrainingData(latents, (prompts[0],) * 3, encoded, way)
    config = replace(CONFIG, validation_prompts=(), max_grad_norm=0.0, steps=1)
    with Training(base, data, config, device=CPU) as training:
        events = training.events()
        next(events)  # everything is built
        state = training._assembly
        assert state is not None
        for number, parameter in enumerate(state.parameters):
            parameter.data += 0.3 * torch.randn(parameter.shape, generator=torch.Generator().manual_seed(number))
        before = [parameter.detach().clone().requires_grad_() for parameter in state.parameters]
        gradients: list[torch.Tensor] = []
        step = state.optimizer.step
        state.optimizer.step = lambda: (gradients.extend(p.grad.clone() for p in state.parameters), step())[1]
        found = next(event for event in events if isinstance(event, StepDone))

    (batch,) = make_micro_step(data, config, flow, 0, CPU).batches
    network = flow.build(torch.float32)
    down_1, up_1, down_2, up_2 = before

    def predict(rows: slice, scale: float) -> torch.Tensor:
        weights = {
            "first.weight": network.first.weight + scale * up_1 @ down_1,
            "second.weight": network.second.weight + scale * up_2 @ down_2,
        }
        x, noise, t = batch.latents[rows], batch.noise[rows], batch.times[rows]
        noisy = (1 - t)[:, None, None, None] * x + t[:, None, None, None] * noise
        context = batch.conditioning.hidden_states[rows]
        return torch.func.functional_call(network, weights, (noisy, t, context))

    photos, added = slice(0, 2), slice(2, 4)
    assert torch.equal(batch.noise[photos], batch.noise[added]) and torch.equal(batch.times[:2], batch.times[2:])
    instance = (predict(photos, 1.0) - (batch.noise - batch.latents)[photos]).square().mean()
    teacher = (predict(added, 1.0) - predict(added, 0.0).detach()).square().mean()
    norm = 0.7 * ((up_1 @ down_1).square().sum() + (up_2 @ down_2).square().sum())
    total = instance + 0.7 * teacher + norm
    wanted = torch.autograd.grad(total, before)

    expected = {"instance_loss": instance, "toy_loss": teacher, "norm_loss": norm}
    assert found.losses == pytest.approx({name: float(loss.detach()) for name, loss in expected.items()}, rel=1e-5)
    assert found.loss == pytest.approx(float(total.detach()), rel=1e-5)
    for mine, other in zip(gradients, wanted, strict=True):
        torch.testing.assert_close(mine, other, rtol=1e-4, atol=1e-7)


def test_the_panels_curves_have_the_names_that_the_way_gives_them() -> None:
    step = StepDone(1, 6, 3.0, {"instance_loss": 1.0, "toy_loss": 1.5, "norm_loss": 0.5}, 1e-2, 0.1, 0.2, None)
    assert curve_points(to_json(step)) == {"loss": 3.0, "subject": 1.0, "toy": 1.5, "norm": 0.5}
    wanted = {"instance_loss": "subject", "prior_loss": "class", "toy_loss": "toy", "norm_loss": "norm"}
    assert ways.loss_labels().items() >= wanted.items()


def test_the_adapter_can_be_switched_off() -> None:
    flow = Flow()
    plain, network = flow.build(torch.float32), flow.build(torch.float32)
    for parameter in adapter.inject(network, CONFIG, flow.adapter_layers(network, "all")):
        parameter.data += 1.0
    given = torch.randn(2, CHANNELS, 8, 8), torch.tensor([0.2, 0.7]), torch.randn(2, 77, 16)
    with adapter.switched_off({"network": network}):
        assert torch.equal(network(*given), plain(*given))
    assert float((network(*given) - plain(*given)).detach().abs().max()) > 0.1
    assert sum(parameter.requires_grad for parameter in network.parameters()) == 4
