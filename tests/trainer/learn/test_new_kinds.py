"""A new kind of network and a new way to keep the class need nothing of the trainer but what is written here.

The network is two linear layers under flow matching (arXiv 2209.03003); the way adds the base's own prediction for
another prompt as a target, and a penalty on the adapter's weights.
"""

from __future__ import annotations

import contextlib
from collections.abc import Generator, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

from subjectbooth.tests.small_base import HashedPrompts, small_subject
from subjectbooth.trainer.base.base_model import BaseModel
from subjectbooth.trainer.base.conditioning import Conditioning
from subjectbooth.trainer.base.denoiser import Denoiser
from subjectbooth.trainer.config import TrainConfig
from subjectbooth.trainer.events import CheckpointSaved, Event, Finished, StepDone, Validation, to_json
from subjectbooth.trainer.files.safetensors_file import read_metadata
from subjectbooth.trainer.learn import adapter
from subjectbooth.trainer.learn.data import TrainingData, make_micro_step
from subjectbooth.trainer.learn.loop import Training
from subjectbooth.trainer.machine.draws import Draws
from subjectbooth.trainer.preserve import ways
from subjectbooth.trainer.preserve.preservation import AdapterLayer, BaseIdentity, Part, Preservation
from subjectbooth.trainer.runs.history import curve_points
from subjectbooth.trainer.runs.run import Run

CPU = torch.device("cpu")
CHANNELS, FACTOR = 3, 4
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


class TwoLayers(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.first, self.second = nn.Linear(CHANNELS + 1 + 16, 16), nn.Linear(16, CHANNELS)

    def forward(self, latents: torch.Tensor, times: torch.Tensor, context: torch.Tensor) -> torch.Tensor:
        pixels = latents.permute(0, 2, 3, 1)
        more = torch.cat([times.to(pixels.dtype)[:, None], context.mean(dim=1)], dim=1)
        inputs = torch.cat([pixels, more[:, None, None].expand(*pixels.shape[:3], -1)], dim=-1)
        return self.second(torch.tanh(self.first(inputs))).permute(0, 3, 1, 2)


class Flow:
    """Noise at time 1, the picture at time 0; the network predicts the velocity between them."""

    latent_channels, latent_factor, native_resolution = CHANNELS, FACTOR, 64
    metadata: Mapping[str, str] = {"ss_base_model_version": "toy", "modelspec.architecture": "toy/lora"}

    def latent_size(self, width: int, height: int) -> tuple[int, int, int]:
        return CHANNELS, height // FACTOR, width // FACTOR

    def build(self, dtype: torch.dtype) -> nn.Module:
        with torch.random.fork_rng():
            torch.manual_seed(3)
            return TwoLayers().to(dtype).requires_grad_(False).eval()

    def outline(self) -> nn.Module | None:
        with torch.device("meta"):
            return TwoLayers()

    def adapter_layers(self, network: nn.Module, lora_targets: str) -> dict[str, nn.Module]:
        return {name: layer for name, layer in network.named_modules() if isinstance(layer, nn.Linear)}

    def file_key(self, layer: str) -> str:
        return f"lora_unet_toy_{layer}"

    def enable_gradient_checkpointing(self, network: nn.Module) -> None:
        raise AssertionError("there is memory enough for two layers")

    def use_attention(self, network: nn.Module, attention: str) -> tuple[str, str]:
        return attention, ""

    def times(self, uniform: torch.Tensor) -> torch.Tensor:
        return uniform.float()

    def noisy_latents(self, latents: torch.Tensor, noise: torch.Tensor, times: torch.Tensor) -> torch.Tensor:
        t = times[:, None, None, None]
        return (1 - t) * latents + t * noise

    def target(self, latents: torch.Tensor, noise: torch.Tensor, times: torch.Tensor) -> torch.Tensor:
        return noise - latents

    def loss_weights(self, times: torch.Tensor, snr_gamma: float) -> torch.Tensor | None:
        return None

    def predict(
        self, network: Any, noisy_latents: torch.Tensor, times: torch.Tensor, conditioning: Conditioning
    ) -> torch.Tensor:
        return network(noisy_latents, times, conditioning.hidden_states).float()

    def sample(
        self,
        network: Any,
        prompts: Conditioning,
        negative: Conditioning,
        size: tuple[int, ...],
        steps: int,
        guidance_scale: float,
        seeds: Sequence[int],
        device: torch.device,
    ) -> Generator[int, None, torch.Tensor]:
        latents = torch.cat([torch.randn(1, *size, generator=torch.Generator().manual_seed(seed)) for seed in seeds])
        for step in range(steps):
            times = torch.full((len(seeds),), 1 - step / steps)
            with torch.no_grad():
                latents = latents - network(latents, times, prompts.hidden_states) / steps
            yield step + 1
        return latents

    def blocks(self, network: nn.Module) -> list[nn.Module]:
        return []

    def countable(self, network: nn.Module) -> AbstractContextManager[None]:
        return contextlib.nullcontext()


class Toy:
    """The base's prediction for other words on the photos' own noisy latents, and a penalty on ``up @ down``."""

    name = "toy"
    losses: Mapping[str, str] = {"toy_loss": "toy", "norm_loss": "norm"}
    key = "toy 1"
    prompts = ("a photo of a dog",)
    record: Mapping[str, str] = {}
    metadata: Mapping[str, str] = {}

    def check(self, size: tuple[int, ...], base: BaseIdentity) -> tuple[str, ...]:
        return ()

    def pictures(self, photos: int) -> int:
        return photos

    def parts(self, photos: Part, draws: Draws, weight: float) -> Sequence[Part]:
        count = len(photos.latents)
        part = Part("toy_loss", weight, photos.latents, self.prompts * count, ("toy",) * count, photos.purpose)
        return [replace(part, from_base=True, like=photos)]

    def penalty(self, layers: Iterator[AdapterLayer], weight: float) -> Mapping[str, torch.Tensor]:
        return {"norm_loss": torch.stack([(x.scale * x.up @ x.down).square().sum() for x in layers]).sum() * weight}


class Codec:
    def encode(self, images: torch.Tensor) -> torch.Tensor:
        return torch.nn.functional.avg_pool2d(images * 2 - 1, FACTOR)

    def decode(self, latents: torch.Tensor) -> torch.Tensor:
        return torch.nn.functional.interpolate(latents / 2 + 0.5, scale_factor=FACTOR).clamp(0, 1)


def toy_base() -> BaseModel:
    denoiser: Denoiser = Flow()
    return BaseModel("Toy", denoiser, HashedPrompts(), Codec(), "toy digest")


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
    assert ways.loss_labels() == {
        "instance_loss": "subject",
        "prior_loss": "class",
        "toy_loss": "toy",
        "norm_loss": "norm",
    }


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
