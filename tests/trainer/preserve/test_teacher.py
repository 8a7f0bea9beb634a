"""What the teacher shows, how often, and in place of what."""

from __future__ import annotations

from collections import Counter
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from subjectbooth.tests.toy_base import CHANNELS, Flow, toy_base
from subjectbooth.trainer.base.conditioning import Conditioning
from subjectbooth.trainer.config import TrainConfig
from subjectbooth.trainer.events import StepDone
from subjectbooth.trainer.learn.batch import Batch
from subjectbooth.trainer.learn.data import TrainingData, make_micro_step, photos_of
from subjectbooth.trainer.learn.loop import Training
from subjectbooth.trainer.preserve.class_images import ClassImages
from subjectbooth.trainer.preserve.preservation import Preservation
from subjectbooth.trainer.preserve.priors import ClassPriors
from subjectbooth.trainer.preserve.teacher import Teacher
from subjectbooth.trainer.preserve.teacher_prompts import OTHER_SENTENCES, class_sentences

CPU = torch.device("cpu")
CONFIG = TrainConfig(steps=6, learning_rate=1e-2, rank=2, network_alpha=2.0, resolution=64, train_batch_size=2)
PRIORS = ClassPriors(torch.full((2, CHANNELS, 16, 16), 9.0), "a photo of a dog", ("1", "2"), "digest", "store")
SIZES = [(16, 16)] * 3 + [(12, 20)] * 2


@pytest.fixture(autouse=True)
def _one_thread(torch_threads: Any) -> None:
    torch_threads(1)


def _data(way: Preservation, sizes: list[tuple[int, int]] = SIZES[:3]) -> TrainingData:
    random = torch.Generator().manual_seed(1)
    latents = tuple(torch.randn(CHANNELS, *size, generator=random) for size in sizes)
    prompts = ["a photo of ohwx dog", *way.prompts, ""]
    encoded = dict(zip(prompts, toy_base().prompts.encode(prompts), strict=True))
    return TrainingData(latents, (prompts[0],) * len(sizes), encoded, way, square=(CHANNELS, 16, 16))


def _batches(way: Preservation, steps: int, sizes: list[tuple[int, int]] = SIZES[:3], **changes: Any) -> list[Batch]:
    data, config = _data(way, sizes), replace(CONFIG, **changes)
    return [batch for step in range(steps) for batch in make_micro_step(data, config, Flow(), step, CPU).batches]


def _shown(batches: list[Batch]) -> list[tuple[torch.Tensor, torch.Tensor, float, str]]:
    """Latents, noise, time and prompt of the teacher's images."""
    return [
        (batch.latents[row], batch.noise[row], float(batch.times[row]), batch.prompts[row])
        for batch in batches
        for row, loss in enumerate(batch.losses)
        if loss == "teacher_loss"
    ]


def test_it_shows_photos_and_noise_for_the_class_for_other_things_and_for_no_prompt() -> None:
    way = Teacher("owl", images=4, replaced=0)
    shown = _shown(_batches(way, 500))
    photos = _data(way).latents
    assert len(shown) == 2000
    prompts = Counter(prompt for *_, prompt in shown)
    own, other = class_sentences("owl"), OTHER_SENTENCES
    assert "a photo of an owl" in own and prompts.keys() == {*own, *other, ""}
    shares = [sum(prompts[prompt] for prompt in group) / 2000 for group in (own, other, ("",))]
    assert shares == pytest.approx([0.4, 0.5, 0.1], abs=0.03)
    noise = [time for latents, _, time, _ in shown if not latents.any()]
    assert len(noise) / 2000 == pytest.approx(0.1, abs=0.02) and min(noise) > 0.999
    which = Counter(
        next(number for number, photo in enumerate(photos) if torch.equal(photo, latents))
        for latents, *_ in shown
        if latents.any()
    )
    assert min(which.values()) > 500
    # The square root of a uniform number has the median 0.71 and the mean 2/3.
    times = torch.tensor([time for latents, _, time, _ in shown if latents.any()])
    assert (float(times.median()), float(times.mean())) == pytest.approx((0.5**0.5, 2 / 3), abs=0.02)
    assert len({float(noise.sum()) for _, noise, *_ in shown}) == 2000
    assert float(torch.stack([noise for _, noise, *_ in shown]).std()) == pytest.approx(1.0, abs=0.01)


def test_class_images_are_shown_as_well_where_they_have_the_size() -> None:
    shown = _shown(_batches(Teacher("dog", PRIORS, images=4), 100))
    assert sum(float(latents.mean()) == 9 for latents, *_ in shown) / 400 == pytest.approx(0.45, abs=0.08)
    shown = _shown(_batches(Teacher("dog", PRIORS, images=4), 100, SIZES))
    sizes = Counter(tuple(latents.shape[1:]) for latents, *_ in shown if float(latents.mean()) == 9)
    assert sizes.keys() == {(16, 16)}


@pytest.mark.parametrize(("batch_size", "counts"), [(1, [1, 1, 0]), (2, [2, 2, 1]), (3, [3, 3, 2])])
def test_its_images_take_the_place_of_photos_which_are_still_used_equally_often(
    batch_size: int, counts: list[int]
) -> None:
    """With buckets, too, where every third batch of a bucket has an image in place of a photo."""
    way = Teacher("dog", every=3)
    data, config = _data(way), replace(CONFIG, train_batch_size=batch_size)
    steps = [make_micro_step(data, config, Flow(), step, CPU) for step in range(9)]
    assert [sum(batch.losses.count("instance_loss") for batch in step.batches) for step in steps] == counts * 3
    assert [step.pictures for step in steps] == [batch_size] * 9
    photos = [photo for step in range(9) for photo in photos_of(data, batch_size, step, 0)]
    assert max(Counter(photos).values()) - min(Counter(photos).values()) <= 1
    data = _data(way, SIZES)
    # After 3 epochs, each bucket has had 3 batches for each of its photos.
    photos = [photo for step in range(15) for photo in photos_of(data, batch_size, step, 0)]
    used = Counter(photos)
    for bucket in data.buckets:
        assert max(used[photo] for photo in bucket) - min(used[photo] for photo in bucket) <= 1
        assert sum(used[photo] for photo in bucket) == 3 * len(bucket) * batch_size - len(bucket)


def test_one_photo_stays_in_every_step() -> None:
    assert [Teacher("dog", images=2, replaced=2).replaces(photos) for photos in (1, 2, 3, 4)] == [0, 1, 2, 2]
    assert [Teacher("dog", every=2, replaced=2).replaces(photos) for photos in (1, 2, 3)] == [1, 2, 2]


def test_a_step_without_photos_reports_the_photos_loss_of_the_others(tmp_path: Path) -> None:
    """With accumulation, a term's loss is the mean over the micro-steps that have it."""
    way = Teacher("dog", every=2)
    config = replace(CONFIG, steps=2, train_batch_size=1, gradient_accumulation_steps=4, noise_offset=0.1)
    with Training(toy_base(), _data(way), config, device=CPU) as training:
        first, second = (event for event in training.events() if isinstance(event, StepDone))
    assert first.loss == pytest.approx((2 * first.losses["instance_loss"] + 8 * 2 * first.losses["teacher_loss"]) / 4)
    assert first.losses["teacher_loss"] == 0 and second.losses["teacher_loss"] > 0
    with Training(toy_base(), _data(way), replace(config, gradient_accumulation_steps=1, steps=4), device=CPU) as one:
        steps = [event.losses for event in one.events() if isinstance(event, StepDone)]
    assert [set(losses) for losses in steps] == [{"instance_loss"}, {"teacher_loss"}] * 2


@pytest.mark.parametrize("resume_at", [0, 5])
def test_a_bank_asks_the_base_once_per_image(monkeypatch: pytest.MonkeyPatch, resume_at: int) -> None:
    """With the bits of a run that asks the base at every step, and after a resumption too."""
    asked: list[int] = []
    predict = Flow.predict

    def counted(self: Flow, network: Any, noisy: torch.Tensor, times: torch.Tensor, text: Conditioning) -> torch.Tensor:
        if not torch.is_grad_enabled():
            asked.append(len(noisy))
        return predict(self, network, noisy, times, text)

    monkeypatch.setattr(Flow, "predict", counted)
    data, config = _data(Teacher("dog", images=2, bank=5)), replace(CONFIG, steps=10)
    found = []
    for bits_kept in (True, False):
        asked.clear()
        resume = None
        if resume_at:
            with Training(toy_base(), data, replace(config, steps=resume_at), device=CPU) as training:
                list(training.events())
                resume = training.snapshot()
            asked.clear()
        with Training(toy_base(), data, config, resume=resume, device=CPU) as training:
            events = training.events()
            next(events)
            if not bits_kept:
                monkeypatch.setattr(training._gradients, "_kept", Forgetful())
            list(events)
            found.append(training.lora())
        assert asked == [1] * (5 if bits_kept else 2 * (10 - resume_at))
    assert all(torch.equal(found[0][name], found[1][name]) for name in found[0])


class Forgetful(dict):  # type: ignore[type-arg]
    def __contains__(self, key: object) -> bool:
        return False


def test_a_bank_is_a_fixed_set_of_images_per_size() -> None:
    way = Teacher("dog", bank=4)
    for sizes, kinds in ((SIZES[:3], 1), (SIZES, 2)):
        shown = _shown(_batches(way, 40, sizes))
        images = {
            (tuple(latents.shape), float(latents.sum()), float(noise.sum()), time, prompt)
            for latents, noise, time, prompt in shown
        }
        assert len(images) == 4 * kinds


@pytest.mark.parametrize("bank", [0, 4])
@pytest.mark.parametrize(("accumulate", "sizes"), [(1, SIZES[:3]), (3, SIZES)])
def test_only_prompts_that_are_shown_are_encoded(bank: int, accumulate: int, sizes: list[tuple[int, int]]) -> None:
    way = Teacher("dog", every=2, images=2, bank=bank)
    micro_steps = 12 * accumulate
    shown = {prompt for *_, prompt in _shown(_batches(way, micro_steps, sizes))}
    encoded = way.prompts_for(CONFIG.seed, micro_steps // 2 * 2)
    assert shown <= set(encoded) <= set(way.prompts) and len(encoded) < len(way.prompts)


@pytest.mark.parametrize(
    "change", [{"every": 2}, {"images": 2}, {"replaced": 0}, {"weight": 4.0}, {"bank": 8}, {"priors": PRIORS}]
)
def test_every_setting_is_in_the_key(change: dict[str, Any]) -> None:
    assert Teacher("dog").key == Teacher("dog").key != Teacher("dog", **change).key


def test_class_images_on_every_second_step_are_used_equally_often() -> None:
    way = ClassImages(replace(PRIORS, latents=torch.arange(3.0)[:, None, None, None].expand(3, CHANNELS, 16, 16)), 2)
    batches = _batches(way, 12, train_batch_size=1)
    assert [len(batch.latents) for batch in batches] == [1, 2] * 6
    used = Counter(int(batch.latents[1].mean()) for batch in batches[1::2])
    assert used == {0: 2, 1: 2, 2: 2}
    assert way.key != ClassImages(PRIORS).key


def test_nothing_that_drift_is_measured_with_is_shown() -> None:
    prompts = pytest.importorskip("subjectbooth.trainer.measure.prompts")
    common = {"a", "an", "and", "of", "on", "in", "the", "photo", "to", "by", "with", "oil", "painting"}
    shown = {word for sentence in OTHER_SENTENCES for word in sentence.split()} - common
    measured = {word for prompt in (*prompts.OTHER_PROMPTS, *prompts.SPARE_PROMPTS) for word in prompt.split()}
    assert not shown & measured
