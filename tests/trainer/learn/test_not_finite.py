"""A loss or gradient that is not finite stops the run, names step and picture, and keeps the last good adapter."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from subjectbooth.tests.small_base import small_base, small_class_images, small_subject, with_network
from subjectbooth.trainer.base.base_model import BaseModel
from subjectbooth.trainer.config import TrainConfig
from subjectbooth.trainer.errors import SubjectBoothError
from subjectbooth.trainer.events import StepDone
from subjectbooth.trainer.learn.loop import Training
from subjectbooth.trainer.runs.run import Run
from subjectbooth.trainer.subject.subject import Subject

CPU = torch.device("cpu")
CONFIG = TrainConfig(steps=9, learning_rate=1e-3, rank=4, network_alpha=4.0, resolution=64, train_batch_size=1)


def _stopped(root: Path, base: BaseModel, subject: Subject, config: TrainConfig = CONFIG) -> tuple[int, str]:
    """Steps done before the error, and its sentence; what is kept is of that step and whole."""
    run, done = Run(base, subject, small_class_images(), config, root, CPU), 0

    def read() -> None:
        nonlocal done
        for event in run.events():
            if isinstance(event, StepDone):
                done = event.step

    with pytest.raises(SubjectBoothError) as failure:
        read()
    kept = run.folder.load_checkpoint(config.steps)
    assert (kept.step if kept else 0) == done
    assert f"at step {done + 1}" in str(failure.value) and f"the adapter of step {done} is kept" in str(failure.value)
    if kept:
        assert run.folder.finished_lora(done) is not None
        assert all(bool(torch.isfinite(tensor).all()) for tensor in kept.adapter.values())
    return done, str(failure.value)


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_a_photo_whose_latents_are_not_finite_is_named(tmp_path: Path, value: float) -> None:
    subject, plain = small_subject(), small_base()
    white = dataclasses.replace(subject.photos[1], pixels=subject.photos[1].pixels * 0 + 255, name="white.png")
    subject = dataclasses.replace(subject, photos=(subject.photos[0], white, subject.photos[2]))

    class Overflows:
        def encode(self, images: torch.Tensor) -> torch.Tensor:
            latents = plain.codec.encode(images)
            latents[images.mean(dim=(1, 2, 3)) > 0.99, 0, 3, 3] = value
            return latents

        def decode(self, latents: torch.Tensor) -> torch.Tensor:
            return plain.codec.decode(latents)

    run = Run(dataclasses.replace(plain, codec=Overflows()), subject, small_class_images(), CONFIG, tmp_path, CPU)
    with pytest.raises(SubjectBoothError) as failure:
        assert not any(isinstance(event, StepDone) for event in run.events())
    said = str(failure.value)
    assert "The VAE turns photo 2 (white.png) into NaN or infinity" in said
    assert "Use another VAE, or one in fp32" in said and "leave that photo out" in said
    assert "0.png" not in said and "class image" not in said


def test_a_loss_that_is_not_finite_by_itself_says_what_usually_helps(tmp_path: Path) -> None:
    subject, plain = small_subject(), small_base()
    odd = dataclasses.replace(subject.photos[2], caption="an odd photo of ohwx dog")
    subject = dataclasses.replace(subject, photos=(*subject.photos[:2], odd))
    marked = plain.prompts.encode([odd.caption])[0].hidden_states

    def build(dtype: torch.dtype) -> Any:
        """A UNet that one caption makes overflow, wherever in the batch it is."""
        unet = plain.denoiser.build(dtype)

        def overflow(module: Any, inputs: Any, keywords: Any, output: Any) -> Any:
            found = keywords["encoder_hidden_states"]
            scale = torch.tensor([float("nan") if torch.equal(one, marked[0]) else 1.0 for one in found])
            return (output[0] * scale[:, None, None, None], *output[1:])

        unet.register_forward_hook(overflow, with_kwargs=True)
        return unet

    _, said = _stopped(tmp_path, with_network(plain, build), subject)
    assert "A loss of " in said and "on photo 3 (2.png). Required" in said
    assert "Lower the learning rate, or set precision to bf16 or fp32" in said
    # With three photos at once the culprit is still told from the others.
    whole = dataclasses.replace(CONFIG, train_batch_size=3)
    _, said = _stopped(tmp_path / "batch", with_network(plain, build), subject, whole)
    assert "on photo 3 (2.png). Required" in said
    assert "0.png" not in said and "class image" not in said


class _Poison(torch.autograd.Function):
    @staticmethod
    def forward(context: Any, tensor: torch.Tensor) -> torch.Tensor:
        return tensor.clone()

    @staticmethod
    def backward(context: Any, gradient: torch.Tensor) -> torch.Tensor:
        return gradient * float("inf")


def test_a_gradient_that_is_not_finite_names_the_batch(tmp_path: Path) -> None:
    plain = small_base()

    def build(dtype: torch.dtype) -> Any:
        unet = plain.denoiser.build(dtype)
        unet.mid_block.register_forward_hook(lambda module, inputs, output: _Poison.apply(output))
        return unet

    done, said = _stopped(tmp_path, with_network(plain, build), small_subject(1))
    assert done == 0
    assert "A gradient norm of nan at step 1, on photo 1 (0.png), class image " in said


@pytest.mark.parametrize("optimizer", ["adamw", "adafactor"])
def test_a_step_that_is_not_finite_changes_nothing_though_it_is_noticed_after_the_optimizer(
    tmp_path: Path, optimizer: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """torch's fused optimizer leaves it out by itself; for others it is noticed before."""
    config = dataclasses.replace(CONFIG, optimizer=optimizer, ema_decay=0.9)
    run = Run(small_base(), small_subject(), small_class_images(), config, tmp_path / "whole", CPU)
    events = run.events()
    while not (isinstance(event := next(events), StepDone) and event.step == 2):
        pass
    events.close()
    plain_clip = Training._clip

    def clip(self: Training, state: Any) -> torch.Tensor:
        norm = plain_clip(self, state)
        if self.step < 2:
            return norm
        for parameter in state.parameters:
            parameter.grad.fill_(float("nan"))
        return norm * float("nan")

    monkeypatch.setattr(Training, "_clip", clip)
    assert _stopped(tmp_path / "broken", small_base(), small_subject(), config)[0] == 2
    broken_run = Run(small_base(), small_subject(), small_class_images(), config, tmp_path / "broken", CPU)
    whole, broken = (each.folder.load_checkpoint(config.steps) for each in (run, broken_run))
    assert whole is not None and broken is not None and broken.step == whole.step == 2
    assert all(torch.equal(whole.adapter[name], broken.adapter[name]) for name in whole.adapter)
    assert all(map(torch.equal, whole.average, broken.average)) and len(whole.average) == len(whole.adapter)
    assert whole.optimizer.keys() == broken.optimizer.keys() and whole.optimizer
    for number, state in whole.optimizer.items():
        for name, value in state.items():
            assert torch.equal(torch.as_tensor(value), torch.as_tensor(broken.optimizer[number][name])), (number, name)


@pytest.mark.parametrize(("scale", "stops"), [(None, True), (65536.0, False), (1.0, False), (0.5, True)])
def test_loss_scaling_may_skip_steps_but_not_for_ever(scale: float | None, stops: bool) -> None:
    scaler = None if scale is None else SimpleNamespace(get_scale=lambda: scale)
    training = SimpleNamespace(step=4)
    made = SimpleNamespace(accelerator=SimpleNamespace(scaler=scaler))
    if stops:
        with pytest.raises(SubjectBoothError, match="step 5, on photo 1"):
            Training._stop_if_gradient_is_not_finite(training, made, float("inf"), ["photo 1"])  # type: ignore[arg-type]
    else:
        Training._stop_if_gradient_is_not_finite(training, made, float("inf"), ["photo 1"])  # type: ignore[arg-type]


def test_a_step_that_fails_half_way_is_not_kept(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    plain_step, calls = torch.optim.AdamW.step, 0

    def step(self: torch.optim.AdamW, closure: Any = None) -> None:
        nonlocal calls
        calls += 1
        if calls < 3:
            plain_step(self, closure)
            return
        self.param_groups[0]["params"][0].data.fill_(77.0)  # some weights are new, others are not
        raise torch.OutOfMemoryError("CUDA out of memory")

    monkeypatch.setattr(torch.optim.AdamW, "step", step)
    often = dataclasses.replace(CONFIG, checkpoint_seconds=0.0)
    run = Run(small_base(), small_subject(), small_class_images(), often, tmp_path, CPU)
    with pytest.raises(SubjectBoothError, match="resumes from its last checkpoint"):
        list(run.events())
    kept = run.folder.load_checkpoint(9)
    assert kept is not None and kept.step == 2
    assert all(float(tensor.abs().max()) < 77.0 for tensor in kept.adapter.values())
