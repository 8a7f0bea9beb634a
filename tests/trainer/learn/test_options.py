"""Every option against a value computed by hand, or against the same thing with the option off."""

from __future__ import annotations

import dataclasses
import math
from pathlib import Path
from typing import Any

import pytest
import safetensors.torch
import torch

from subjectbooth.tests.small_base import (
    alphas_cumprod,
    small_base,
    small_class_images,
    small_denoiser,
    small_subject,
    small_unet,
    with_lora,
)
from subjectbooth.trainer.base.conditioning import EncodedText
from subjectbooth.trainer.base.sd.schedule import make_noise_scheduler, min_snr_weights
from subjectbooth.trainer.config import TrainConfig, run_key
from subjectbooth.trainer.errors import SubjectBoothError
from subjectbooth.trainer.events import Finished, Started, StepDone
from subjectbooth.trainer.learn import adapter, checkpoint, optimizers
from subjectbooth.trainer.learn.batch import Batch, Term
from subjectbooth.trainer.learn.checkpoint import Checkpoint
from subjectbooth.trainer.learn.data import TrainingData, make_micro_step
from subjectbooth.trainer.learn.ema import AdapterAverage
from subjectbooth.trainer.learn.loss import weighted_losses
from subjectbooth.trainer.learn.optimizers import make_optimizer
from subjectbooth.trainer.machine.draws import low_discrepancy, shuffled_indices
from subjectbooth.trainer.machine.processes import Processes
from subjectbooth.trainer.machine.runtime import rounding
from subjectbooth.trainer.preserve.class_images import ClassImages
from subjectbooth.trainer.preserve.priors import ClassPriors
from subjectbooth.trainer.runs.run import Run

CPU = torch.device("cpu")
# Of runs from before averages warmed up.
PLAIN_KEY = "f78e97703918d7eb3bcdfd9bd44aeed33c25f42a015909ef9746ae5294f9fecc"
AVERAGED_KEY = "aed425ee513eb7c339113178c8f089fb6b97f07fa411b68b1ba7e151b257f262"


def _config(**changes: Any) -> TrainConfig:
    return TrainConfig(
        **{
            "steps": 4,
            "learning_rate": 1e-3,
            "rank": 4,
            "network_alpha": 4.0,
            "resolution": 64,
            "train_batch_size": 2,
            **changes,
        }
    )


def _data(photos: int = 3) -> TrainingData:
    random = torch.Generator().manual_seed(1)
    return TrainingData(
        latents=torch.randn(photos, 4, 8, 8, generator=random),
        captions=tuple(f"photo {number}" for number in range(photos)),
        encoded={
            "": EncodedText(torch.zeros(1, 77, 16)),
            **{f"photo {number}": EncodedText(torch.full((1, 77, 16), number + 1.0)) for number in range(photos)},
        },
        flipped_latents=100 + torch.randn(photos, 4, 8, 8, generator=random),
    )


DENOISER = small_denoiser()


def spread_timesteps(first: int, count: int, seed: int) -> torch.Tensor:
    return DENOISER.times(low_discrepancy(first, count, seed, "timesteps"))


def make_batch(*arguments: Any) -> Batch:
    (batch,) = make_micro_step(*arguments).batches
    return batch


@pytest.mark.parametrize(
    ("settings", "timesteps"),
    [
        ({}, [100, 500, 841]),
        ({"timestep_sampling": "uniform"}, [100, 500, 841]),
        # The standard normal's quantiles of 0.1, 0.5 and 0.8413 are -1.2816, 0 and 1; 1 / (1 + exp(-x)) of them.
        ({"timestep_sampling": "logit_normal"}, [217, 500, 731]),
        # 3 t / (1 + 2 t)
        ({"timestep_shift": 3.0}, [250, 750, 940]),
        ({"timestep_sampling": "logit_normal", "timestep_shift": 3.0}, [454, 750, 890]),
    ],
)
def test_times_are_where_they_are_asked_for(settings: dict[str, Any], timesteps: list[int]) -> None:
    base = small_base().with_times_of(_config(**settings))
    uniform = torch.tensor([0.1, 0.5, 0.8413447461], dtype=torch.float64)
    assert base.denoiser.times(uniform).tolist() == timesteps


def test_a_run_trains_at_the_times_that_are_asked_for(tmp_path: Path) -> None:
    """As a run of its own; what nobody asked for is in no key, as before."""
    found = {}
    for settings in ({}, {"timestep_sampling": "logit_normal"}, {"timestep_shift": 3.0}):
        run = Run(small_base(), small_subject(), None, _config(steps=1, **settings), tmp_path, CPU)
        losses = [event.loss for event in run.events() if isinstance(event, StepDone)]
        assert run.result is not None
        with safetensors.safe_open(run.folder.lora_path(1), "pt") as file:
            kept = {name: value for name, value in file.metadata().items() if "timestep" in name}
        assert kept == {f"subjectbooth.{name}": str(value).removesuffix(".0") for name, value in settings.items()}
        found[run.folder.key] = losses[0]
    assert len(found) == len(set(found.values())) == 3
    assert not {"timestep_sampling", "timestep_shift"} & _config().key_fields().keys()


@pytest.mark.parametrize("prediction_type", ["epsilon", "v_prediction"])
def test_min_snr(prediction_type: str) -> None:
    scheduler = make_noise_scheduler(alphas_cumprod(), prediction_type)
    timesteps = torch.tensor([0, 100, 500, 999])
    alphas = alphas_cumprod()[timesteps].double()
    for index, alpha in enumerate(alphas.tolist()):
        snr = alpha / (1 - alpha)
        expected = min(snr, 5.0) / (snr if prediction_type == "epsilon" else snr + 1)
        assert float(min_snr_weights(scheduler, timesteps, 5.0)[index]) == pytest.approx(expected, rel=1e-4)


def test_min_snr_is_finite_at_zero_terminal_snr() -> None:
    alphas = alphas_cumprod()
    alphas[-1] = 0.0
    weights = min_snr_weights(make_noise_scheduler(alphas, "epsilon"), torch.tensor([999]), 5.0)
    assert weights.tolist() == [1.0]


def test_weights_and_masks_in_the_loss() -> None:
    random = torch.Generator().manual_seed(0)
    prediction, target = (torch.randn(4, 4, 8, 8, generator=random) for _ in range(2))
    weights = torch.tensor([0.5, 2.0, 1.0, 3.0])
    masks = torch.zeros(2, 1, 8, 8)
    masks[0, :, :4] = 1.0
    masks[1] = 0.25
    found = weighted_losses(
        prediction,
        target,
        ("instance_loss",) * 2 + ("prior_loss",) * 2,
        (Term("instance_loss", 1.0, 2), Term("prior_loss", 0.7, 2)),
        weights,
        masks,
    )
    errors = (prediction - target) ** 2
    first = float(errors[0, :, :4].mean())  # the mean over the masked half
    second = float(errors[1].mean())  # an even mask is no mask
    instance = (0.5 * first + 2.0 * second) / 2
    prior = (1.0 * float(errors[2].mean()) + 3.0 * float(errors[3].mean())) / 2
    assert float(found.terms["instance_loss"]) == pytest.approx(instance, rel=1e-5)
    assert float(found.total) == pytest.approx(instance + 0.7 * prior, rel=1e-5)


def test_noise_offset_adds_one_number_to_each_channel_and_leaves_the_rest() -> None:
    plain = make_batch(_data(), _config(), DENOISER, 3, CPU)
    offset = make_batch(_data(), _config(noise_offset=0.1), DENOISER, 3, CPU)
    difference = offset.noise - plain.noise
    torch.testing.assert_close(
        difference, difference.mean(dim=(2, 3), keepdim=True).expand_as(difference), atol=1e-6, rtol=0
    )
    assert len(difference[:, :, 0, 0].unique()) == 2 * 4  # another one for every picture and channel
    assert float(difference.abs().max()) > 0.01
    assert torch.equal(plain.times, offset.times)
    many = torch.cat(
        [
            (
                make_batch(_data(), _config(noise_offset=0.1), DENOISER, step, CPU).noise
                - make_batch(_data(), _config(), DENOISER, step, CPU).noise
            )[:, :, 0, 0]
            for step in range(300)
        ]
    )
    assert float(many.std()) == pytest.approx(0.1, rel=0.05)


def test_caption_dropout_flip_and_order() -> None:
    data, config = _data(), _config(caption_dropout=0.3)
    dropped = flipped = 0
    seen = []
    for step in range(300):
        batch = make_batch(data, config, DENOISER, step, CPU)
        photos = shuffled_indices(step * 2, 2, 3, 0, "photos")
        seen += photos
        for place, photo in enumerate(photos):
            value = float(batch.conditioning.hidden_states[place, 0, 0])
            assert value in (0.0, photo + 1.0)  # the empty prompt, or this photo's own
            dropped += value == 0.0
            is_flipped = float(batch.latents[place].mean()) > 50
            source = data.flipped_latents if is_flipped else data.latents
            assert torch.equal(batch.latents[place], source[photo])
            flipped += is_flipped
    assert dropped / 600 == pytest.approx(0.3, abs=0.06)
    assert flipped / 600 == pytest.approx(0.5, abs=0.06)
    assert [seen.count(photo) for photo in range(3)] == [200, 200, 200]


def _with_classes(data: TrainingData, classes: torch.Tensor) -> TrainingData:
    return dataclasses.replace(
        data,
        preservation=ClassImages(ClassPriors(classes, "a class", (), "")),
        encoded={**data.encoded, "a class": EncodedText(torch.full((1, 77, 16), 9.0))},
    )


def test_everything_random_follows_the_seed() -> None:
    data = _with_classes(_data(), torch.zeros(4, 4, 8, 8))

    def drawn(seed: int) -> dict[str, list[Any]]:
        config = _config(seed=seed, flip=True, caption_dropout=0.5, noise_offset=0.1)
        batches = [make_batch(data, config, DENOISER, step, CPU) for step in range(20)]
        return {
            "first weights": [tensor.tolist() for tensor in with_lora(small_unet(), config)],
            "noise": [batch.noise.tolist() for batch in batches],
            "timesteps": [batch.times.tolist() for batch in batches],
            "photos": [batch.labels[:2] for batch in batches],
            "class images": [batch.labels[2:] for batch in batches],
            "captions": [prompt == "" for batch in batches for prompt in batch.prompts],
            "mirrored": [(batch.latents[:2].mean(dim=(1, 2, 3)) > 50).tolist() for batch in batches],
        }

    first, again, other = drawn(1), drawn(1), drawn(2)
    assert first == again
    assert [name for name in first if first[name] == other[name]] == []


def test_class_images_keep_their_caption_and_are_not_mirrored() -> None:
    classes = torch.randn(4, 4, 8, 8, generator=torch.Generator().manual_seed(2))
    data = _with_classes(_data(), classes)
    for step in range(20):
        batch = make_batch(data, _config(caption_dropout=1.0, flip=True), DENOISER, step, CPU)
        assert batch.prompts == ("", "", "a class", "a class")
        assert batch.conditioning.hidden_states[:, 0, 0].tolist() == [0.0, 0.0, 9.0, 9.0]
        assert torch.equal(batch.latents[2:], classes[shuffled_indices(step * 2, 2, 4, 0, "class images")])


def test_timesteps_are_spread_evenly_over_any_stretch_and_each_is_as_likely() -> None:
    for seed in range(20):
        for first in (0, 7, 100_000, 10**9):
            drawn = spread_timesteps(first, 8, seed).sort().values
            gaps = [*drawn.diff().tolist(), 1000 + int(drawn[0]) - int(drawn[-1])]
            assert max(gaps) <= 237  # nine of ten sets of independent draws have a larger one
    many = torch.bincount(spread_timesteps(0, 10_000, 3), minlength=1000)
    assert 8 <= int(many.min()) and int(many.max()) <= 12  # independent draws: 1 to 24 or so
    # One draw of each of many runs: uniform over the seeds too.
    firsts = torch.cat([spread_timesteps(5, 1, seed) for seed in range(4000)])
    assert float(firsts.float().mean()) == pytest.approx(499.5, abs=15)
    assert float(firsts.float().std()) == pytest.approx(1000 / 12**0.5, rel=0.03)


class OneOf(Processes):
    def __init__(self, rank: int, count: int) -> None:
        self.rank, self.count = rank, count


def test_processes_share_one_draw() -> None:
    whole = make_batch(_data(), _config(train_batch_size=4), DENOISER, 5, CPU)
    step = make_micro_step(_data(), _config(train_batch_size=4), DENOISER, 5, CPU)
    shares = [step.share(OneOf(process, 3)) for process in range(3)]
    assert [share.pictures for share in shares] == [step.pictures] * 3  # over which a term is averaged
    parts = [batch for share in shares for batch in share.batches]
    assert max(len(part.labels) for part in parts) - min(len(part.labels) for part in parts) <= 1
    assert torch.equal(whole.noise, torch.cat([part.noise for part in parts]))
    assert torch.equal(whole.latents, torch.cat([part.latents for part in parts]))
    assert torch.equal(whole.times, torch.cat([part.times for part in parts]))


def test_ema_is_the_average_and_gives_the_weights_back() -> None:
    parameter = torch.nn.Parameter(torch.tensor([1.0]))
    average = AdapterAverage([parameter], 0.9)
    for value in (2.0, 5.0):
        with torch.no_grad():
            parameter.fill_(value)
        average.update(1000)
    assert float(average.average[0]) == pytest.approx(0.9 * (0.9 * 1 + 0.1 * 2) + 0.1 * 5)
    with average.applied():
        assert torch.equal(parameter.detach(), average.average[0])
    assert parameter.tolist() == [5.0]


@pytest.mark.parametrize("decay", [0.99, 0.999, 0.9999])
def test_the_average_of_a_short_run_has_what_it_learned(decay: float) -> None:
    """60 steps of one size, as a constant learning rate makes them; without a warm-up 0.9999 saves 0.3 % of them."""
    parameter = torch.nn.Parameter(torch.zeros(1))
    average = AdapterAverage([parameter], decay)
    for step in range(60):
        with torch.no_grad():
            parameter += 1.0
        average.update(step)
    assert float(average.average[0]) >= 0.899 * 60
    # A long one averages as the decay says.
    before = float(average.average[0])
    average.update(10**6)
    assert float(average.average[0]) == pytest.approx(before + (1 - decay) * (60 - before), rel=1e-6)


def test_the_key_tells_averages_with_a_warm_up_from_those_of_before() -> None:
    """Keys that were written before averages warmed up; without one, runs are found again under their old key."""
    assert run_key(TrainConfig(), "subject", "base", "priors", "ohwx dog") == PLAIN_KEY
    assert run_key(TrainConfig(ema_decay=0.9), "subject", "base", "priors", "ohwx dog") != AVERAGED_KEY


def test_the_key_tells_runs_that_are_now_rounded_in_another_way(monkeypatch: pytest.MonkeyPatch) -> None:
    """Those in half precision, and those with the optimizer that is now fused; all others are found again."""
    gpu = torch.device("cuda")
    monkeypatch.setattr(torch.cuda, "is_bf16_supported", lambda including_emulation: True)
    for device, changes, is_new in (
        (CPU, {}, False),
        (CPU, {"precision": "fp16"}, False),  # which is fp32 there
        (CPU, {"precision": "bf16"}, True),
        (gpu, {}, True),
        (gpu, {"precision": "fp32"}, True),
        (gpu, {"precision": "fp32", "optimizer": "adafactor"}, False),
    ):
        config = TrainConfig(**changes)
        key = run_key(config, "subject", "base", "priors", "ohwx dog", rounding(config, device))
        assert (key != run_key(config, "subject", "base", "priors", "ohwx dog")) == is_new


@pytest.mark.parametrize(("targets", "layers"), [("attention", 16), ("attention+mlp", 20), ("all", None)])
def test_lora_targets(targets: str, layers: int | None) -> None:
    unet = small_unet()
    expected = (
        layers
        if layers is not None
        else sum(
            isinstance(layer, torch.nn.Linear) or (isinstance(layer, torch.nn.Conv2d) and layer.kernel_size == (1, 1))
            for layer in unet.modules()
        )
    )
    blocks = sum(name.endswith("attn1.to_q") for name, _ in unet.named_modules())
    if layers is not None:
        expected = blocks * (8 if targets == "attention" else 10)
    parameters = with_lora(unet, _config(lora_targets=targets))
    assert len(parameters) == 2 * expected


def test_rank_stabilised_scale_is_what_the_file_says() -> None:
    plain, tuned = small_unet(), small_unet()
    config = _config(use_rslora=True, rank=4, network_alpha=3.0, lora_targets="all")
    with_lora(tuned, config)
    state = {
        name: 0.1 * torch.randn(tensor.shape, generator=torch.Generator().manual_seed(1))
        for name, tensor in adapter.adapter_state(tuned).items()
    }
    adapter.load_adapter_state(tuned, state)
    kohya = adapter.to_file(state, small_denoiser().file_key, adapter.file_alpha(config))
    assert adapter.file_alpha(config) / 4 == pytest.approx(3.0 / math.sqrt(4))
    for name, layer in plain.named_modules():
        key = f"lora_unet_{name.replace('.', '_')}"
        if f"{key}.lora_up.weight" in kohya:
            up, down = kohya[f"{key}.lora_up.weight"].flatten(1), kohya[f"{key}.lora_down.weight"].flatten(1)
            with torch.no_grad():
                layer.weight += (kohya[f"{key}.alpha"] / 4 * up @ down).reshape(layer.weight.shape)
    latents, context = torch.randn(1, 4, 8, 8), torch.randn(1, 77, 16)
    torch.testing.assert_close(
        tuned(latents, 300, context).sample, plain(latents, 300, context).sample, rtol=1e-3, atol=1e-4
    )


def test_optimizers_and_their_fall_back() -> None:
    parameters = [torch.nn.Parameter(torch.ones(3, 3))]
    for name, kind in (("adamw", "AdamW"), ("adafactor", "Adafactor")):
        optimizer, notes = make_optimizer(parameters, [], _config(optimizer=name, weight_decay=0.5), CPU)
        assert type(optimizer).__name__ == kind
        assert optimizer.param_groups[0]["weight_decay"] == 0.5
        assert notes == ()
    eight_bit, notes = make_optimizer(parameters, [], _config(optimizer="adamw8bit"), CPU)
    assert type(eight_bit) is torch.optim.AdamW
    assert notes == ("adamw8bit needs an NVIDIA GPU; this run uses adamw",)


def test_a_missing_prodigy_is_said_and_adamw_used(monkeypatch: pytest.MonkeyPatch) -> None:
    import importlib.util

    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    optimizer, notes = make_optimizer([torch.nn.Parameter(torch.ones(2))], [], _config(optimizer="prodigy"), CPU)
    assert type(optimizer) is torch.optim.AdamW
    assert "prodigyopt" in notes[0]


def test_a_run_without_its_optimizer_is_adamws_and_is_not_found_again_once_it_is_there(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with monkeypatch.context() as without:
        without.setattr(optimizers, "_missing", lambda name, device: "no package" if name == "prodigy" else "")
        _, events = _train(tmp_path, optimizer="prodigy", learning_rate=1.0)
        assert events[0].notes == ("no package at a learning rate of 0.0001",)
        # Prodigy's usual 1 would destroy an adapter in AdamW's hands.
        assert {event.learning_rate for event in events if isinstance(event, StepDone)} == {1e-4}
        _, again = _train(tmp_path, optimizer="adamw", learning_rate=1e-4)
        assert isinstance(again[0], Finished)  # it is that very run
    _, events = _train(tmp_path, optimizer="prodigy", learning_rate=1.0)
    assert events[0].chosen["optimizer"] == "prodigy" and events[0].notes == ()


def test_prodigy_trains_a_text_encoder_at_its_own_rate(tmp_path: Path) -> None:
    adapter_bytes, events = _train(tmp_path, optimizer="prodigy", learning_rate=1.0, train_text_encoder=True)
    assert events[0].notes == ("prodigy also estimates the text encoder's learning rate: text_encoder_lr is not used",)
    ups = {name: tensor for name, tensor in safetensors.torch.load(adapter_bytes).items() if "lora_up" in name}
    assert any(name.startswith("lora_te") for name in ups)
    assert all(bool(tensor.any()) for tensor in ups.values())


def test_the_average_goes_on_where_the_optimizer_cannot(tmp_path: Path) -> None:
    """A run whose optimizer is not to be had any more starts its moments anew, and keeps its average."""
    config = _config(ema_decay=0.9, learning_rate=1e-2)

    def until(step: int) -> Checkpoint:
        run = Run(small_base(), small_subject(), small_class_images(), config, tmp_path, CPU)
        reading = run.events()
        for event in reading:
            if isinstance(event, StepDone) and event.step == step:
                reading.close()
        kept = run.folder.load_checkpoint(4)
        assert kept is not None and kept.step == step
        return kept

    before = until(2)
    path = next(tmp_path.glob("*/checkpoint*.safetensors"))
    chosen = {**before.chosen, "optimizer": "adamw8bit"}
    checkpoint.save(path, dataclasses.replace(before, chosen=chosen, optimizer={}))
    after = until(3)
    for average, was in zip(after.average, before.average, strict=True):
        assert any(
            torch.allclose(average, was.lerp(weights, 0.75), rtol=1e-5, atol=1e-8)
            for weights in after.adapter.values()
            if weights.shape == was.shape
        )


def _train(root: Path, stops: tuple[int, ...] = (), **changes: Any) -> tuple[bytes, list[Any]]:
    config = _config(**changes)
    events: list[Any] = []
    for stop in (*stops, None):
        run = Run(small_base(), small_subject(), small_class_images(), config, root, CPU)
        reading = run.events()
        for event in reading:
            events.append(event)
            if isinstance(event, StepDone) and event.step == stop:
                reading.close()
                break
    return run.folder.finished_lora(4).read_bytes(), events


ALL_AT_ONCE = {
    "lora_dropout": 0.2,
    "snr_gamma": 5.0,
    "noise_offset": 0.05,
    "caption_dropout": 0.2,
    "flip": True,
    "ema_decay": 0.9,
    "use_rslora": True,
    "lora_targets": "all",
    "gradient_accumulation_steps": 2,
}


@pytest.mark.oldest
@pytest.mark.parametrize("optimizer", ["adamw", "adafactor", "prodigy"])
def test_a_cancelled_run_with_everything_on_ends_bit_identical(tmp_path: Path, optimizer: str) -> None:
    chosen = {"optimizer": optimizer, **({"learning_rate": 1.0} if optimizer == "prodigy" else {}), **ALL_AT_ONCE}
    whole, events = _train(tmp_path / "whole", **chosen)
    assert events[0].chosen["optimizer"] == optimizer
    torch.manual_seed(123)
    cut, _ = _train(tmp_path / "cut", (1, 3), **chosen)
    first, second = (safetensors.torch.load(content) for content in (whole, cut))
    assert all(torch.equal(first[name], second[name]) for name in first)


@pytest.mark.parametrize("option", sorted(ALL_AT_ONCE))
def test_every_option_changes_the_weights_and_the_key(tmp_path: Path, option: str) -> None:
    plain, _ = _train(tmp_path)
    changed, events = _train(tmp_path, **{option: ALL_AT_ONCE[option]})
    # Of the weights alone: the metadata name every setting, so the files always differ.
    first, second = (safetensors.torch.load(content) for content in (plain, changed))
    assert any(not torch.equal(first[name], second[name]) for name in first if name.endswith("lora_up.weight"))
    assert isinstance(events[0], Started)  # not found again under the plain run's key


def test_fall_backs_reach_the_user(tmp_path: Path) -> None:
    _, events = _train(tmp_path, optimizer="adamw8bit", precision="fp16")
    assert set(events[0].notes) == {
        "adamw8bit needs an NVIDIA GPU; this run uses adamw",
        "precision fp16 needs a GPU; this run uses fp32",
    }


def test_a_masked_loss_without_a_mask_is_refused(tmp_path: Path) -> None:
    with pytest.raises(SubjectBoothError, match="masked_loss without a mask"):
        _train(tmp_path, masked_loss=True)
