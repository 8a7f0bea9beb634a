"""The plan of a run's memory: its figures against what real tensors take, and what is chosen because of it."""

from __future__ import annotations

import dataclasses
import weakref
from pathlib import Path
from typing import Any

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

from subjectbooth.tests.small_base import (
    small_base,
    small_class_images,
    small_denoiser,
    small_subject,
    small_text_encoder,
    small_unet,
    with_lora,
)
from subjectbooth.trainer.base.conditioning import Conditioning, EncodedText
from subjectbooth.trainer.base.sd.target_layers import text_target_layers
from subjectbooth.trainer.base.sd.unet import predict
from subjectbooth.trainer.config import TrainConfig
from subjectbooth.trainer.events import Started, StepDone
from subjectbooth.trainer.learn import adapter
from subjectbooth.trainer.learn.data import TrainingData, largest_load, make_micro_step
from subjectbooth.trainer.learn.optimizers import make_optimizer
from subjectbooth.trainer.machine.out_of_memory import free_bytes
from subjectbooth.trainer.machine.resolved_settings import ResolvedSettings
from subjectbooth.trainer.machine.runtime import choose_precision
from subjectbooth.trainer.memory import plan
from subjectbooth.trainer.memory.footprint import Footprint, drawing_bytes, training_footprint
from subjectbooth.trainer.memory.plan import Load, make_plan, optimizer_bytes, pictures_that_fit
from subjectbooth.trainer.preserve.class_images import ClassImages
from subjectbooth.trainer.preserve.none import NoPreservation
from subjectbooth.trainer.preserve.priors import ClassPriors
from subjectbooth.trainer.runs.run import Run

CPU = torch.device("cpu")
CONFIG = TrainConfig(steps=2, learning_rate=1e-3, rank=4, network_alpha=4.0, resolution=64, train_batch_size=2)
PROMPT = EncodedText(torch.zeros(1, 77, 16))


class RealMemory(TorchDispatchMode):
    """The most bytes of real tensors that are alive at once, `ignored` not among them."""

    def __init__(self, ignored: Any) -> None:
        super().__init__()
        self.live = self.peak = 0
        self.seen = {tensor.untyped_storage()._cdata: 0 for tensor in ignored}

    def __torch_dispatch__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        made = function(*args, **(kwargs or {}))
        for tensor in made if isinstance(made, (tuple, list)) else (made,):
            if isinstance(tensor, torch.Tensor) and tensor.untyped_storage()._cdata not in self.seen:
                storage = tensor.untyped_storage()
                self.seen[storage._cdata] = storage.nbytes()
                self.live += storage.nbytes()
                self.peak = max(self.peak, self.live)
                weakref.finalize(storage, self.drop, storage._cdata)
        return made

    def drop(self, key: int) -> None:
        self.live -= self.seen.pop(key, 0)


def _real_peak(unet: torch.nn.Module, pictures: int, size: int) -> int:
    for parameter in unet.parameters():
        parameter.grad = torch.zeros_like(parameter) if parameter.requires_grad else None
    latents, context = torch.randn(pictures, 4, size, size), torch.randn(pictures, 77, 16)
    gradients = [parameter.grad for parameter in unet.parameters() if parameter.grad is not None]
    memory = RealMemory([*unet.parameters(), *gradients, latents, context])
    with memory:
        loss = (unet(latents, torch.zeros(pictures, dtype=torch.int64), context).sample - latents).square().mean()
        loss.backward()
    return memory.peak


@pytest.mark.oldest
@pytest.mark.parametrize("targets", ["attention", "all"])
def test_activations_are_what_real_tensors_take(targets: str) -> None:
    unet = small_unet()
    with_lora(unet, dataclasses.replace(CONFIG, lora_targets=targets))
    unet.train()
    before = {name: tensor.clone() for name, tensor in unet.state_dict().items()}
    processors = [type(processor) for processor in unet.attn_processors.values()]
    state = torch.get_rng_state()
    counted = training_footprint(small_denoiser(), unet, PROMPT, (32, 32), torch.float32)
    assert torch.equal(torch.get_rng_state(), state)
    assert [type(processor) for processor in unet.attn_processors.values()] == processors
    assert all(torch.equal(tensor, before[name]) for name, tensor in unet.state_dict().items())
    for pictures in (1, 3):
        assert pictures * counted.whole == pytest.approx(_real_peak(unet, pictures, 32), rel=0.05)
    unet.enable_gradient_checkpointing()
    for pictures in (1, 3):
        assert pictures * counted.checkpointed == pytest.approx(_real_peak(unet, pictures, 32), rel=0.1)
    # A UNet that checkpoints already is counted no differently.
    assert training_footprint(small_denoiser(), unet, PROMPT, (32, 32), torch.float32) == counted


def test_activations_of_deep_transformers_are_what_real_tensors_take() -> None:
    """SDXL's layout at a small size: few, deep blocks, which decide with checkpointing and are counted once each."""
    from diffusers import UNet2DConditionModel

    unet = UNet2DConditionModel(
        block_out_channels=(32, 64),
        layers_per_block=1,
        cross_attention_dim=16,
        attention_head_dim=(4, 8),
        down_block_types=("DownBlock2D", "CrossAttnDownBlock2D"),
        up_block_types=("CrossAttnUpBlock2D", "UpBlock2D"),
        transformer_layers_per_block=(1, 4),
        use_linear_projection=True,
        norm_num_groups=8,
    ).requires_grad_(False)
    with_lora(unet, CONFIG)
    unet.train()
    counted = training_footprint(small_denoiser(), unet, PROMPT, (32, 32), torch.float32)
    assert counted.whole == pytest.approx(_real_peak(unet, 1, 32), rel=0.05)
    unet.enable_gradient_checkpointing()
    real = _real_peak(unet, 1, 32)
    assert real <= counted.checkpointed <= 1.15 * real  # counted as if all of the forward pass were alive


def test_half_precision_takes_about_half() -> None:
    unet = small_unet()
    with_lora(unet, CONFIG)
    full, half = (
        training_footprint(small_denoiser(), unet.train(), PROMPT, (32, 32), dtype)
        for dtype in (torch.float32, torch.float16)
    )
    assert 0.45 < half.whole / full.whole < 0.65  # the sums of attention and the loss stay in float32
    assert not any(module._forward_pre_hooks for module in unet.modules())
    assert not any("forward" in module.__dict__ for module in unet.modules())


@pytest.mark.parametrize("name", ["adamw", "adafactor"])
def test_optimizer_states_are_counted_exactly(name: str) -> None:
    unet = small_unet()
    parameters = with_lora(unet, dataclasses.replace(CONFIG, lora_targets="all"))
    optimizer, _ = make_optimizer(parameters, [], dataclasses.replace(CONFIG, optimizer=name), CPU)
    for parameter in parameters:
        parameter.grad = torch.ones_like(parameter)
    optimizer.step()
    real = sum(
        value.nbytes
        for state in optimizer.state.values()
        for value in state.values()
        if isinstance(value, torch.Tensor) and value.numel() > 1
    )
    assert optimizer_bytes(name, parameters) == pytest.approx(real, rel=0.02)
    assert optimizer_bytes("adamw8bit", [torch.empty(64, 64)]) == 2 * 4096 + 8 * 4096 // 256
    assert optimizer_bytes("prodigy", [torch.empty(10, 10)]) == 1600


GB = 10**9


def _choose(
    monkeypatch: pytest.MonkeyPatch,
    free: int | None,
    pictures: int = 4,
    kept: ResolvedSettings | None = None,
    config: TrainConfig = CONFIG,
) -> plan.Plan:
    """With activations of 2 GB a picture, 0.4 GB with checkpointing."""
    monkeypatch.setattr(plan, "training_footprint", lambda *_: Footprint(2 * GB, 4 * GB // 10))
    monkeypatch.setattr(plan, "_counted", {})
    unet = small_unet()
    with_lora(unet, config)
    load = Load(PROMPT, (8, 8), pictures)
    return make_plan(config, ResolvedSettings("adamw"), kept, small_denoiser(), unet, None, [], load, free)


@pytest.mark.parametrize(("device", "setting", "on"), [
    ("cuda", "auto", True), ("cuda", "off", False), ("cpu", "auto", False),
])  # fmt: skip
def test_what_cannot_be_counted_is_checkpointed_on_a_card(
    monkeypatch: pytest.MonkeyPatch, device: str, setting: str, on: bool
) -> None:
    """All images at once: only the step-down knows whether they fit."""

    def not_countable(*_: object) -> None:
        raise NotImplementedError

    monkeypatch.setattr(plan, "training_footprint", not_countable)
    monkeypatch.setattr(plan, "_counted", {})
    unet, config = small_unet(), dataclasses.replace(CONFIG, gradient_checkpointing=setting)
    with_lora(unet, config)
    chosen = ResolvedSettings("adamw", device)
    found = make_plan(config, chosen, None, small_denoiser(), unet, None, [], Load(PROMPT, (8, 8), 4), 1000 * GB)
    assert found.activations is None and "(unknown)" in found.sentence
    assert (found.chosen.gradient_checkpointing, found.chosen.micro_batch) == (on, 4)


@pytest.mark.parametrize(
    ("free", "checkpointing", "pictures"),
    [
        (None, "off", 4),
        (10 * GB, "off", 4),
        (8 * GB, "off", 2),
        (4 * GB, "on", 4),
        (GB, "on", 2),
        (GB // 2, "on", 1),
        (GB // 10, "on", 1),
    ],
)
def test_what_fits_is_chosen_the_fastest_first(
    monkeypatch: pytest.MonkeyPatch, free: int | None, checkpointing: str, pictures: int
) -> None:
    made = _choose(monkeypatch, free)
    assert made.chosen.gradient_checkpointing == (checkpointing == "on")
    assert made.chosen.micro_batch == pictures
    assert made.fits == (free != GB // 10)
    if not made.fits:  # the smallest is tried all the same
        assert "will probably not fit" in made.warning
        assert "a lower resolution, a lower rank, the optimizer adamw8bit" in made.warning
    else:
        assert made.warning == ""
        assert free is None or made.needed <= 0.9 * free


def test_what_was_asked_for_or_kept_stays(monkeypatch: pytest.MonkeyPatch) -> None:
    asked = dataclasses.replace(CONFIG, gradient_checkpointing="off", pictures_per_forward=3)
    assert not _choose(monkeypatch, GB, config=asked).chosen.gradient_checkpointing
    assert _choose(monkeypatch, GB, config=asked).chosen.micro_batch == 3
    on = dataclasses.replace(CONFIG, gradient_checkpointing="on")
    assert _choose(monkeypatch, 100 * GB, config=on).chosen.gradient_checkpointing
    kept = ResolvedSettings("adamw", gradient_checkpointing=True, micro_batch=1)
    made = _choose(monkeypatch, 100 * GB, kept=kept, config=asked)
    assert made.chosen == kept
    # Who has asked for less memory since then gets it.
    kept = ResolvedSettings("adamw", gradient_checkpointing=False, micro_batch=4)
    less = dataclasses.replace(CONFIG, gradient_checkpointing="on", pictures_per_forward=2)
    made = _choose(monkeypatch, 100 * GB, kept=kept, config=less)
    assert made.chosen.gradient_checkpointing
    assert made.chosen.micro_batch == 2


def test_the_sentence_adds_up(monkeypatch: pytest.MonkeyPatch) -> None:
    made = _choose(monkeypatch, GB)
    assert made.needed == made.base + made.adapter + made.optimizer + 2 * 4 * GB // 10
    assert made.sentence.endswith(
        "+ activations 0.80 = 0.80 of 1.00 GB free; fp32, adamw, checkpointing on, 4 images in micro-batches of 2"
    )
    assert _choose(monkeypatch, GB, pictures=1).sentence.endswith(", 1 image in micro-batches of 1")
    unet = small_unet()
    assert made.base == sum(parameter.nbytes for parameter in unet.parameters())
    trained = sum(parameter.nbytes for parameter in with_lora(unet, CONFIG))
    assert made.adapter == 2 * trained
    average = _choose(monkeypatch, GB, config=dataclasses.replace(CONFIG, ema_decay=0.9))
    assert average.adapter == 3 * trained


def test_a_trained_text_encoder_counts(monkeypatch: pytest.MonkeyPatch) -> None:
    alone = _choose(monkeypatch, None)
    unet, text = small_unet(), small_text_encoder()
    with_lora(unet, CONFIG)
    adapter.inject(text, CONFIG, text_target_layers(text, CONFIG.lora_targets))
    load = Load(PROMPT, (8, 8), 4)
    both = make_plan(
        CONFIG, ResolvedSettings("adamw"), None, small_denoiser(), unet, small_base().text, [text], load, None
    )
    frozen = sum(
        tensor.nbytes for name, tensor in (*text.named_parameters(), *text.named_buffers()) if ".subject." not in name
    )
    assert both.base - alone.base == frozen
    assert both.activations is not None and alone.activations is not None
    # 2 prompts, 2 layers, s h (34 + 5 a s / h) bytes in half, twice that in fp32
    assert both.activations - alone.activations == 2 * 2 * 77 * 16 * (34 + 5 * 2 * 77 / 16) * 2


def _conditioning(chunks: int) -> Conditioning:
    return EncodedText(torch.zeros(1, 77 * chunks, 16))


@pytest.mark.parametrize(
    ("batch", "class_chunks", "chunks", "text_chunks"),
    [
        (1, None, 3, 3),
        (1, 1, 3, 4),
        (1, 2, 6, 5),
        (2, None, 6, 5),
        (2, 1, 6, 6),
        (4, None, 6, 7),
    ],
)
def test_the_longest_prompts_that_can_meet_in_a_batch_count(
    batch: int, class_chunks: int | None, chunks: int, text_chunks: int
) -> None:
    """The shorter ones are repeated to the length of the longest, or to one that both lengths divide."""
    captions = ("one", "two", "three", "one again")
    encoded = dict(zip(captions, map(_conditioning, (1, 2, 3, 1)), strict=True)) | {"": _conditioning(1)}
    if class_chunks:
        encoded["class"] = _conditioning(class_chunks)
    priors = ClassPriors(torch.zeros(2, 4, 8, 8), "class", (), "")
    data = TrainingData(
        torch.zeros(4, 4, 8, 8), captions, encoded, ClassImages(priors) if class_chunks else NoPreservation()
    )
    load = largest_load(data, batch)
    assert load.conditioning.hidden_states.shape == (1, 77 * chunks, 16)
    assert load.pictures == (2 if class_chunks else 1) * batch
    assert load.text_tokens == 77 * text_chunks
    assert load.size == (8, 8)
    # What a step really takes in is never longer.
    config = dataclasses.replace(CONFIG, train_batch_size=batch)
    lengths = [
        made.conditioning.hidden_states.shape[1]
        for step in range(8)
        for made in make_micro_step(data, config, small_denoiser(), step, CPU).batches
    ]
    assert max(lengths) <= 77 * chunks


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_drawing_takes_what_real_tensors_take(dtype: torch.dtype) -> None:
    unet = small_unet().to(dtype)
    latents, context = torch.randn(1, 4, 16, 16), torch.randn(1, 77, 16)
    memory = RealMemory([*unet.parameters(), *unet.buffers(), latents, context])
    with torch.no_grad(), memory:
        predict(unet, latents, torch.zeros(1, dtype=torch.int64), EncodedText(context))
    counted = drawing_bytes(small_denoiser(), unet, EncodedText(context), (16, 16), dtype)
    assert memory.peak <= counted * 1.02
    assert counted <= memory.peak * 1.1


def test_what_cannot_be_counted_ends_no_run(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    def fails(*_: Any) -> Footprint:
        raise NotImplementedError("another diffusers")

    monkeypatch.setattr(plan, "training_footprint", fails)
    monkeypatch.setattr(plan, "_counted", {})
    run = Run(small_base(), small_subject(), None, CONFIG, tmp_path, CPU)
    started = next(event for event in run.events() if isinstance(event, Started))
    assert "activations (unknown)" in started.plan


def _run(root: Path, free: int, config: TrainConfig = CONFIG) -> Run:
    return Run(small_base(), small_subject(), small_class_images(), config, root, CPU, lambda device: free)


def test_a_resumed_run_keeps_its_first_choice_and_the_file_says_it(tmp_path: Path) -> None:
    import safetensors

    unet = small_unet()
    weights = sum(parameter.nbytes for parameter in unet.parameters())
    reading = _run(tmp_path, 1).events()  # a single byte beside the weights: the smallest is used
    started = next(reading)
    assert isinstance(started, Started)
    assert started.chosen["gradient_checkpointing"] == "on"
    assert started.chosen["pictures_per_forward"] == "1"
    assert f"of {weights / 1e9:.2f} GB free" in started.plan
    assert any("will probably not fit" in note for note in started.notes)
    for event in reading:
        if isinstance(event, StepDone):
            reading.close()
            break
    assert _run(tmp_path, 10**12).folder.key == _run(tmp_path, 1).folder.key
    events = list(_run(tmp_path, 10**12).events())
    assert events[0].step == 1
    assert events[0].chosen["gradient_checkpointing"] == "on"
    assert events[0].chosen["pictures_per_forward"] == "1"
    assert not events[0].notes
    path = _run(tmp_path, 1).folder.finished_lora(2)
    assert path is not None
    with safetensors.safe_open(path, "pt") as file:
        metadata = file.metadata()
    assert metadata["subjectbooth.gradient_checkpointing"] == "on"
    assert metadata["subjectbooth.pictures_per_forward"] == "1"
    assert metadata["ss_gradient_checkpointing"] == "True"
    assert metadata["ss_mixed_precision"] == "no"
    assert metadata["ss_optimizer"] == "adamw"


def test_a_run_of_fp16_that_goes_on_on_a_cpu_says_that_it_cannot() -> None:
    precision, notes = choose_precision(CONFIG, CPU, kept="fp16")
    assert precision == "fp32"
    assert notes == ("precision fp16 needs a GPU; this run uses fp32",)
    assert choose_precision(CONFIG, CPU, kept="bf16")[0] == "bf16"


def test_with_memory_enough_nothing_is_cut(tmp_path: Path) -> None:
    started = next(_run(tmp_path, 10**12).events())
    assert isinstance(started, Started)
    assert started.chosen["gradient_checkpointing"] == "off"
    assert started.chosen["pictures_per_forward"] == "4"
    assert started.notes == ()


def test_pictures_that_fit() -> None:
    assert [pictures_that_fit(lambda count: 100.0 * count, free, 4) for free in (-5, 90, 222, 223, 400, 445, 9999)] == [
        1,
        1,
        1,
        2,
        3,
        4,
        4,
    ]


def test_free_memory_of_this_machine() -> None:
    free = free_bytes(CPU)
    if free is not None:  # not known on macOS
        import psutil

        assert free == pytest.approx(psutil.virtual_memory().available, rel=0.2)


def test_plan_alone_writes_nothing(tmp_path: Path) -> None:
    made = _run(tmp_path / "runs", 10**12).plan()
    assert made.pictures == 4
    assert made.chosen.micro_batch == 4
    assert not (tmp_path / "runs").exists()
