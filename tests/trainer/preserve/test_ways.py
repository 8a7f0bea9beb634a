"""What every way to keep the class must do. A new way is tested by its line in the registry."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from subjectbooth.tests.small_base import small_base, small_subject
from subjectbooth.tests.toy_base import Flow, toy_base
from subjectbooth.trainer.base.base_model import BaseModel
from subjectbooth.trainer.base.conditioning import EncodedText
from subjectbooth.trainer.config import TrainConfig
from subjectbooth.trainer.errors import SubjectBoothError
from subjectbooth.trainer.events import CheckpointSaved, StepDone
from subjectbooth.trainer.files.safetensors_file import read_metadata
from subjectbooth.trainer.learn.batch import Batch
from subjectbooth.trainer.learn.data import TrainingData, largest_load, make_micro_step
from subjectbooth.trainer.learn.loop import Training
from subjectbooth.trainer.machine.processes import Processes
from subjectbooth.trainer.preserve.dco import DirectConsistency
from subjectbooth.trainer.preserve.preservation import Preservation
from subjectbooth.trainer.preserve.priors import ClassPriors
from subjectbooth.trainer.preserve.ways import WAYS, keeping_class, loss_labels
from subjectbooth.trainer.runs.run import Run
from subjectbooth.trainer.shell.terms import error_in_shell
from subjectbooth.trainer.subject.subject import Subject

CPU = torch.device("cpu")
CONFIG = TrainConfig(
    steps=4,
    learning_rate=1e-2,
    rank=2,
    network_alpha=4.0,
    resolution=64,
    train_batch_size=2,
    prior_loss_weight=0.7,
    checkpoint_seconds=0.0,
)
ALL = pytest.mark.parametrize("name", WAYS)


@pytest.fixture(autouse=True)
def _one_thread(torch_threads: Any) -> None:
    torch_threads(1)


def _priors(base: BaseModel) -> ClassPriors:
    size = base.denoiser.latent_size(64, 64)
    latents = torch.randn(3, *size, generator=torch.Generator().manual_seed(5))
    return ClassPriors(latents, "a photo of a dog", ("1", "2", "3"), "priors", "store")


class OneOf(Processes):
    def __init__(self, rank: int, count: int) -> None:
        self.rank, self.count = rank, count


def _way(name: str, base: BaseModel) -> Preservation:
    return keeping_class(_priors(base), "dog", name)


def _subject() -> Subject:
    """Photos of two shapes, with masks."""
    photos = [replace(photo, mask=photo.pixels[:, :, 0].astype("float32") / 255) for photo in small_subject().photos]
    wide = replace(photos[0], pixels=photos[0].pixels[:52].copy(), mask=photos[0].mask[:52].copy())
    return replace(small_subject(), photos=(wide, *photos[1:]))


def _data(way: Preservation, base: BaseModel, photos: int = 3, **changes: Any) -> TrainingData:
    latents = torch.randn(photos, *base.denoiser.latent_size(64, 64), generator=torch.Generator().manual_seed(1))
    prompts = ["a photo of ohwx dog", *way.prompts, ""]
    encoded = dict(zip(prompts, base.prompts.encode(prompts), strict=True))
    return TrainingData(latents, (prompts[0],) * photos, encoded, way, **changes)


def _run(
    root: Path, base: BaseModel, way: Preservation, stop_at: int = 0, **changes: Any
) -> tuple[list[StepDone], Path, dict[str, torch.Tensor]]:
    """Train, or only up to the checkpoint of a step."""
    import safetensors.torch

    config = replace(CONFIG, **changes)
    run = Run(base, _subject(), way, config, root, CPU)
    steps = []
    for event in run.events():
        if isinstance(event, StepDone):
            steps.append(event)
        if isinstance(event, CheckpointSaved) and event.step == stop_at:
            break
    path = run.folder.finished_lora(config.steps)
    return steps, path or Path(), {} if path is None else safetensors.torch.load_file(path)


EVERYTHING = {
    "gradient_accumulation_steps": 2,
    "masked_loss": True,
    "flip": True,
    "caption_dropout": 0.3,
    "enable_bucket": True,
    "snr_gamma": 5.0,
    "noise_offset": 0.1,
    "ema_decay": 0.9,
    "train_text_encoder": True,
    "text_encoder_share": 0.5,
}


@ALL
def test_a_resumed_run_ends_with_the_same_bits_and_names_the_way(tmp_path: Path, name: str) -> None:
    base = small_base()
    whole, path, wanted = _run(tmp_path / "whole", base, _way(name, base), **EVERYTHING)
    assert read_metadata(path)["subjectbooth.preservation"] == name
    terms = set().union(*(step.losses for step in whole))
    assert terms == {"instance_loss", *WAYS[name].losses} and terms <= set(loss_labels())
    _run(tmp_path / "cut", base, _way(name, base), stop_at=3, **EVERYTHING)
    steps, _, found = _run(tmp_path / "cut", base, _way(name, base), **EVERYTHING)
    assert [step.step for step in steps] == [4]
    assert steps[0].losses == whole[3].losses
    assert wanted.keys() == found.keys() and all(torch.equal(wanted[key], found[key]) for key in wanted)


@ALL
def test_one_image_at_a_time_learns_the_same(tmp_path: Path, name: str) -> None:
    base = small_base()
    together, alone = (
        _run(tmp_path / str(count), base, _way(name, base), steps=3, pictures_per_forward=count)[0] for count in (0, 1)
    )
    for one, other in zip(together, alone, strict=True):
        assert one.losses == pytest.approx(other.losses, rel=1e-4)
        assert (one.loss, one.grad_norm) == pytest.approx((other.loss, other.grad_norm), rel=1e-3)


@ALL
@pytest.mark.parametrize("batch_size", [1, 2, 3])
def test_the_memory_plan_counts_the_largest_micro_step(name: str, batch_size: int) -> None:
    """Prompts of the way have two chunks, the caption three."""
    base = toy_base()
    data = _data(_way(name, base), base)
    chunks = {prompt: 3 if "ohwx" in prompt else 2 if "photo" in prompt else 1 for prompt in data.encoded}
    long = {prompt: EncodedText(torch.zeros(1, 77 * count, 16)) for prompt, count in chunks.items()}
    data, config = replace(data, encoded=long), replace(CONFIG, train_batch_size=batch_size)
    load = largest_load(data, batch_size)
    steps = [make_micro_step(data, config, base.denoiser, step, CPU) for step in range(24)]
    assert load.pictures == max(step.pictures for step in steps)
    batches = [batch for step in steps for batch in step.batches]
    longest = max(batch.conditioning.hidden_states.shape[1] for batch in batches)
    assert load.conditioning.hidden_states.shape[1] == longest
    most = max(sum(77 * chunks[prompt] for prompt in set(batch.prompts)) for batch in batches)
    assert most <= load.text_tokens <= most + 77 * 3 * (batch_size - 1)


@ALL
def test_processes_share_the_images_of_a_step(name: str) -> None:
    """Each image is one process's, in the order of the whole batch."""
    base = toy_base()
    data, config = _data(_way(name, base), base), replace(CONFIG, train_batch_size=3)
    for number in range(4):
        whole = make_micro_step(data, config, base.denoiser, number, CPU)
        shares = [whole.share(OneOf(process, 2)) for process in (0, 1)]
        images = [torch.cat([b.noise.flatten(1) for b in step.batches]) for step in (whole, *shares)]
        assert torch.equal(images[0], torch.cat(images[1:])) and abs(len(images[1]) - len(images[2])) <= 1


def test_the_key_tells_ways_and_strengths_apart() -> None:
    base = toy_base()
    keys = [_way(name, base).key for name in WAYS] + [keeping_class(None, "dog", "teacher").key]
    assert len(set(keys)) == len(keys)
    assert keeping_class(None, "dog", "teacher").key != keeping_class(None, "cat", "teacher").key
    # As before there were others: runs of then are found again.
    assert (_way("none", base).key, _way("class_images", base).key) == (None, "priors")


@pytest.mark.parametrize(
    ("name", "wanted"),
    [
        ("class_images", "Use --num_class_images 24, or --preservation curvature"),
        ("clas_images", "one of curvature, class_images, teacher, "),
    ],
)
def test_a_way_that_cannot_be_used_is_rejected(name: str, wanted: str) -> None:
    with pytest.raises(SubjectBoothError) as found:
        keeping_class(None, "dog", name)
    assert wanted in error_in_shell(found.value)


def test_direct_consistency_weighs_a_photo_by_how_much_better_than_the_base_it_is() -> None:
    photo_loss = DirectConsistency(beta=1000).photo_loss(0.5)
    assert photo_loss is not None
    better = torch.tensor([-0.01, -0.002, 0.0, 0.002], requires_grad=True)
    losses = photo_loss.of(better + 0.3, torch.full((4,), 0.3))
    exact = better.detach().double()
    torch.testing.assert_close(losses, (-torch.log(torch.sigmoid(-500 * exact)) / 250).float(), rtol=1e-3, atol=1e-7)
    (gradient,) = torch.autograd.grad(losses.sum(), better)
    # 2 sigmoid(500 d): a photo that is no better than for the base counts as much as in the plain loss.
    torch.testing.assert_close(gradient, torch.tensor([0.01339, 0.53788, 1.0, 1.46212]), rtol=1e-3, atol=1e-5)
    assert DirectConsistency().photo_loss(0.0) is None


# One step by hand

Predict = Callable[[slice, float], torch.Tensor]
Losses = dict[str, tuple[float, torch.Tensor]]
"""Weight and value of each term; weight 0 for those that are only reported."""


def _mse(prediction: torch.Tensor, target: torch.Tensor) -> torch.Tensor:
    return (prediction - target.detach()).square().mean()


def _plain(batch: Batch, predict: Predict, count: int) -> dict[str, Any]:
    photos = slice(0, count)
    return {"instance_loss": (1.0, _mse(predict(photos, 1.0), (batch.noise - batch.latents)[photos]))}


def _none(batch: Batch, predict: Predict, parameters: list[torch.Tensor]) -> Losses:
    return _plain(batch, predict, 2)


def _class_images(batch: Batch, predict: Predict, parameters: list[torch.Tensor]) -> Losses:
    rows = slice(2, 4)
    return _plain(batch, predict, 2) | {
        "prior_loss": (0.7, _mse(predict(rows, 1.0), (batch.noise - batch.latents)[rows]))
    }


def _teacher(batch: Batch, predict: Predict, parameters: list[torch.Tensor]) -> Losses:
    """One photo of two is replaced."""
    rows = slice(1, 2)
    return _plain(batch, predict, 1) | {"teacher_loss": (0.7 * 8, _mse(predict(rows, 1.0), predict(rows, 0.0)))}


def _weight_l2(batch: Batch, predict: Predict, parameters: list[torch.Tensor]) -> Losses:
    """The adapter's scale is 2."""
    down_1, up_1, down_2, up_2 = parameters
    change = torch.cat([(2 * up_1 @ down_1).flatten(), (2 * up_2 @ down_2).flatten()])
    # Reported as it enters the sum.
    return _plain(batch, predict, 2) | {"weight_loss": (1.0, 0.7 * 0.05 * (change**2).sum())}


def _dco(batch: Batch, predict: Predict, parameters: list[torch.Tensor]) -> Losses:
    """Beta is 700."""
    target = batch.noise - batch.latents
    each = [
        [_mse(predict(slice(row, row + 1), strength), target[row : row + 1]) for row in (0, 1)]
        for strength in (1.0, 0.0)
    ]
    plain, base = map(torch.stack, each)
    learned = (-torch.log(torch.sigmoid(-(700 * (plain - base.detach())).double())) / 350).float().mean()
    return {"instance_loss": (0.0, plain.mean()), "consistency_loss": (1.0, learned)}


def _curvature(batch: Batch, predict: Predict, parameters: list[torch.Tensor]) -> Losses:
    """The matrices are compared in test_study.py."""
    down_1, up_1, down_2, up_2 = parameters
    with Training(toy_base(), _data(_way("curvature", toy_base()), toy_base()), CONFIG, device=CPU) as training:
        next(event for event in training.events() if isinstance(event, StepDone))
        studied = training.studied
    assert studied is not None
    changes = []
    for number, change in enumerate((2 * up_1 @ down_1, 2 * up_2 @ down_2)):
        roots = [studied[f"{number}.{kind}"][0] for kind in ("inputs", "outputs")]
        inputs, outputs = (root @ root.T for root in roots)
        changes.append((outputs @ change @ inputs @ change.T).trace())
    return _plain(batch, predict, 2) | {"curvature_loss": (1.0, 0.7 * 256 * float(studied["factor"]) * sum(changes))}


BY_HAND = {
    "none": _none,
    "class_images": _class_images,
    "curvature": _curvature,
    "teacher": _teacher,
    "weight_l2": _weight_l2,
    "dco": _dco,
}


@ALL
def test_one_step_equals_a_computation_by_hand(name: str) -> None:
    """Loss and gradient of a step from an adapter that is not zero."""
    base, flow = toy_base(), Flow()
    data = _data(_way(name, base), base)
    config = replace(CONFIG, max_grad_norm=0.0, steps=1)
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

    def predict(rows: slice, strength: float) -> torch.Tensor:
        scale = strength * 2.0  # network_alpha / rank
        weights = {
            "first.weight": network.first.weight + scale * up_1 @ down_1,
            "second.weight": network.second.weight + scale * up_2 @ down_2,
        }
        x, noise, t = batch.latents[rows], batch.noise[rows], batch.times[rows]
        noisy = (1 - t)[:, None, None, None] * x + t[:, None, None, None] * noise
        context = batch.conditioning.hidden_states[rows]
        return torch.func.functional_call(network, weights, (noisy, t, context))

    losses = BY_HAND[name](batch, predict, before)
    total = sum(weight * loss for weight, loss in losses.values() if weight)
    wanted = torch.autograd.grad(total, before)
    assert found.losses == pytest.approx({term: float(loss.detach()) for term, (_, loss) in losses.items()}, rel=1e-5)
    assert found.loss == pytest.approx(float(total.detach()), rel=1e-5)
    for mine, other in zip(gradients, wanted, strict=True):
        torch.testing.assert_close(mine, other, rtol=1e-4, atol=1e-7)
