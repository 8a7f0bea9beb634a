"""Scores on fixed noise: right by a computation by hand, the same after a resume, and without any effect on the run."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from pathlib import Path

import pytest
import torch

from subjectbooth.tests.small_base import small_base, small_subject
from subjectbooth.tests.trainer.learn.test_new_kinds import CHANNELS, CONFIG, CPU, Flow, toy_base
from subjectbooth.trainer.config import TrainConfig
from subjectbooth.trainer.events import Adjusted, Event, Scores, StepDone
from subjectbooth.trainer.learn import probe
from subjectbooth.trainer.learn.data import Photos, ProbePrompts, TrainingData
from subjectbooth.trainer.learn.loop import Training
from subjectbooth.trainer.learn.probe import Probe
from subjectbooth.trainer.machine.draws import generator_for, low_discrepancy
from subjectbooth.trainer.runs.best_step import share_curves
from subjectbooth.trainer.runs.history import read_history
from subjectbooth.trainer.runs.run import Run

PROMPTS = ProbePrompts(
    "a photo of ohwx dog",
    "a photo of a dog",
    ("a photo of ohwx dog on a beach", "a photo of ohwx dog at night"),
    ("a photo of a dog on a beach", "a photo of a dog at night"),
)
SETTINGS = dataclasses.replace(CONFIG, validation_prompts=(), validation_interval=2)


def toy_data(scored: bool = True, masks: torch.Tensor | None = None) -> TrainingData:
    base = toy_base()
    prompts = [*PROMPTS.all, ""]
    encoded = dict(zip(prompts, base.prompts.encode(prompts), strict=True))
    latents = torch.randn(3, CHANNELS, 16, 16, generator=torch.Generator().manual_seed(1))
    crop = torch.randn(1, CHANNELS, 8, 8, generator=torch.Generator().manual_seed(2))
    held_out = Photos(crop, (PROMPTS.class_prompt,))
    return TrainingData(
        latents,
        (PROMPTS.subject, PROMPTS.class_prompt, PROMPTS.subject),
        encoded,
        masks=masks,
        probe=PROMPTS if scored else None,
        held_out=held_out if scored else None,
    )


@pytest.mark.parametrize("micro_batch", [1, 3])
@pytest.mark.parametrize("masked", [False, True])
def test_scores_equal_a_computation_by_hand(micro_batch: int, masked: bool) -> None:
    masks = torch.rand(3, 1, 16, 16, generator=torch.Generator().manual_seed(3)) if masked else None
    data = toy_data(masks=masks)
    with Training(toy_base(), data, SETTINGS, device=CPU) as training:
        training.plan()
        state = training._assembly
        assert state is not None
        state.use(dataclasses.replace(state.chosen, micro_batch=micro_batch))
        for number, parameter in enumerate(state.parameters):
            parameter.data += 0.3 * torch.randn(parameter.shape, generator=torch.Generator().manual_seed(number))
        down_1, up_1, down_2, up_2 = [parameter.detach().clone() for parameter in state.parameters]
        scores = Probe(Flow(), data, state, 0.0)
        found, of_base = scores.scores(), scores.scores(with_adapter=False)
        assert scores.scores() == found, "nothing is drawn, and nothing of the base stays switched on"

    network = Flow().build(torch.float32)

    def predict(noisy: torch.Tensor, times: torch.Tensor, prompt: str, scale: float) -> torch.Tensor:
        weights = {
            "first.weight": network.first.weight + scale * up_1 @ down_1,
            "second.weight": network.second.weight + scale * up_2 @ down_2,
        }
        context = data.encode([prompt]).hidden_states.expand(len(noisy), -1, -1)
        return torch.func.functional_call(network, weights, (noisy, times, context)).detach()

    def loss(photos: Photos, views: int, purpose: str, scale: float) -> float:
        times, total = low_discrepancy(0, views, 0, f"probe {purpose}").float(), 0.0
        for view in range(views):
            photo = view % len(photos.captions)
            x, t = photos.latents[photo], times[view]
            noise = torch.randn(x.shape, generator=generator_for(0, f"probe {purpose}", view))
            prediction = predict(((1 - t) * x + t * noise)[None], t[None], photos.captions[photo], scale)[0]
            errors = (prediction - (noise - x)).square()
            weights = torch.ones(1, *x.shape[1:]) if photos.masks is None else photos.masks[photo]
            total += float((errors * weights).sum() / weights.sum() / CHANNELS) / views
        return total

    def on_fixed_noise(prompt: str, scale: float) -> torch.Tensor:
        x, times = data.latents[0].expand(2, -1, -1, -1), torch.tensor([0.65, 0.8])
        noise, t = torch.randn(x.shape, generator=generator_for(0, "probe scenes", 0)), times[:, None, None, None]
        return predict((1 - t) * x + t * noise, times, prompt, scale)

    def expected(scale: float) -> dict[str, float]:
        base = on_fixed_noise(PROMPTS.class_prompt, 0.0)
        moved = (on_fixed_noise(PROMPTS.class_prompt, scale) - base).square().mean()
        kept = []
        for subject_scene, class_scene in zip(PROMPTS.subject_in_scenes, PROMPTS.class_in_scenes, strict=True):
            change = on_fixed_noise(class_scene, 0.0) - base
            left = on_fixed_noise(subject_scene, scale) - on_fixed_noise(PROMPTS.subject, scale)
            kept.append(float((change * left).sum() / change.square().sum()))
        assert data.held_out is not None
        return {
            "photo_loss": loss(data.photos, 4, "photos", scale),
            "held_out_loss": loss(data.held_out, 2, "held out", scale),
            "class_drift": float(moved / (base - on_fixed_noise("", 0.0)).square().mean()),
            "scene_kept": sum(kept) / len(kept),
        }

    assert found == pytest.approx(expected(1.0), rel=1e-4)
    assert of_base == pytest.approx(expected(0.0), rel=1e-4) and of_base["class_drift"] == 0.0
    assert found["class_drift"] > 1e-3 and abs(found["scene_kept"] - of_base["scene_kept"]) > 1e-3


def _trained(data: TrainingData, config: TrainConfig) -> tuple[list[Event], dict[str, torch.Tensor]]:
    with Training(toy_base(), data, config, device=CPU) as training:
        return list(training.events()), training.lora()


def test_a_run_has_the_same_bits_with_and_without_scores() -> None:
    """With dropout, which must neither change the scores nor be left switched off."""
    config = dataclasses.replace(SETTINGS, ema_decay=0.9, lora_dropout=0.3)
    (events, lora), (plain_events, plain_lora) = (_trained(toy_data(scored), config) for scored in (True, False))
    scores = [event for event in events if isinstance(event, Scores)]
    assert [event.step for event in scores] == [0, 2, 4, 6]
    kinds = [type(event) for event in events if isinstance(event, (StepDone, Scores))]
    assert kinds[:4] == [StepDone, StepDone, Scores, Scores]  # nothing is scored before there is something to score
    assert not any(isinstance(event, Scores) for event in plain_events)
    assert all(torch.equal(lora[name], plain_lora[name]) for name in lora) and lora.keys() == plain_lora.keys()
    losses, plain_losses = (
        [event.losses for event in told if isinstance(event, StepDone)] for told in (events, plain_events)
    )
    assert losses == plain_losses
    again = [event for event in _trained(toy_data(), config)[0] if isinstance(event, Scores)]
    assert again == scores
    not_averaged, _ = _trained(toy_data(), dataclasses.replace(config, ema_decay=0.0))
    assert not_averaged[-1] != scores[-1], "scored is the average, which is what the file has"
    assert [event.losses for event in not_averaged if isinstance(event, StepDone)] == losses


def test_too_little_memory_for_scores_skips_them(monkeypatch: pytest.MonkeyPatch) -> None:
    whole = Probe.scores

    def scores(self: Probe, with_adapter: bool = True) -> dict[str, float]:
        if with_adapter:
            raise MemoryError
        return whole(self, with_adapter)

    monkeypatch.setattr(probe.Probe, "scores", scores)
    events, lora = _trained(toy_data(), SETTINGS)
    assert [event.step for event in events if isinstance(event, Scores)] == [0]
    notes = [event.note for event in events if isinstance(event, Adjusted)]
    assert notes == [f"not enough memory for the scores of step {step}: skipped" for step in (2, 4, 6)]
    monkeypatch.undo()
    assert all(torch.equal(tensor, lora[name]) for name, tensor in _trained(toy_data(), SETTINGS)[1].items())


def _run(root: Path, stop: Callable[[Event], bool] = lambda event: False) -> Run:
    config = TrainConfig(
        steps=4, rank=2, network_alpha=2.0, learning_rate=1e-2, resolution=64, validation_interval=2,
        train_text_encoder=True, text_encoder_lr=1e-2, ema_decay=0.9, precision="fp32",
    )  # fmt: skip
    run = Run(small_base(), small_subject(), None, config, root, CPU)
    for event in run.events():
        if stop(event):
            break
    return run


def test_a_resumed_run_has_the_scores_of_an_uninterrupted_one(tmp_path: Path) -> None:
    """Its text encoder is trained, too. The scores of the step at which it stopped are still missing then."""
    whole = _run(tmp_path / "whole")
    scores = whole.folder.scores(4)
    assert list(scores) == [0, 2, 4] and scores[0]["class_drift"] == 0.0 < scores[2]["class_drift"]
    cut = _run(tmp_path / "cut", lambda event: isinstance(event, StepDone) and event.step == 2)
    assert not cut.folder.scores(4)
    assert _run(tmp_path / "cut").folder.scores(4) == scores
    steps = [entry["step"] for entry in cut.folder.entries() if entry["event"] == "Scores"]
    assert sorted(steps) == [0, 2, 4], "each of them once"
    curves = share_curves(scores)
    assert read_history(whole.folder.path)["scores"] == curves and set(curves) == {"subject", "scenes", "class"}
    assert curves["class"][0] == [0, 1.0] and [step for step, _ in curves["subject"]] == [0, 2, 4]


def test_a_run_of_before_scores_its_base_when_it_goes_on(tmp_path: Path) -> None:
    cut = _run(tmp_path, lambda event: isinstance(event, StepDone) and event.step == 3)
    lines = cut.folder.log_path.read_text("utf-8").splitlines(keepends=True)
    cut.folder.log_path.write_text("".join(line for line in lines if '"Scores"' not in line), "utf-8")
    assert list(_run(tmp_path).folder.scores(4)) == [0, 4]


@pytest.mark.parametrize(("photos", "held_out"), [(3, False), (4, True)])
def test_crops_are_held_out_of_four_photos_or_more(tmp_path: Path, photos: int, held_out: bool) -> None:
    run = Run(small_base(), small_subject(photos), None, TrainConfig(steps=1, rank=2, resolution=64), tmp_path, CPU)
    events = run.events()
    scores = next(event for event in events if isinstance(event, Scores))
    events.close()
    assert ("held_out_loss" in scores.values) is held_out
