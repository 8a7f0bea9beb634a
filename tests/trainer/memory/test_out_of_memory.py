"""Out of memory, made to happen at chosen places: the run steps down, says so, and learns the same."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import safetensors.torch
import torch

from subjectbooth.tests.small_base import small_base, small_class_images, small_subject, with_network
from subjectbooth.trainer.config import TrainConfig
from subjectbooth.trainer.errors import SubjectBoothError
from subjectbooth.trainer.events import Adjusted, StepDone
from subjectbooth.trainer.machine.out_of_memory import is_out_of_memory
from subjectbooth.trainer.machine.resolved_settings import ResolvedSettings
from subjectbooth.trainer.memory.step_down import step_down
from subjectbooth.trainer.runs.run import Run

CONFIG = TrainConfig(
    steps=4, learning_rate=1e-3, rank=4, network_alpha=4.0, resolution=64, train_batch_size=2, validation_interval=0
)


@pytest.fixture(autouse=True)
def _one_queue(torch_threads: Callable[[int], None]) -> None:
    """A GPU takes a batch whole; a CPU would share it out to its threads (tests/trainer/learn/test_side_by_side.py)."""
    torch_threads(1)


class Limit:
    """A UNet hook that fails as CUDA does: for batches above `pictures` while training, from call number `after` on."""

    def __init__(self, pictures: int, after: int = 0, needs_checkpointing: bool = False) -> None:
        self.pictures, self.after, self.needs_checkpointing = pictures, after, needs_checkpointing
        self.calls = 0
        self.sizes: list[int] = []

    def __call__(self, module: torch.nn.Module, arguments: tuple[Any, ...], keywords: dict[str, Any]) -> None:
        self.calls += 1
        size = len(arguments[0])
        # diffusers marks each block that recomputes its activations
        checkpointing = any(getattr(block, "gradient_checkpointing", False) for block in module.modules())
        if self.calls > self.after and (size > self.pictures or (self.needs_checkpointing and not checkpointing)):
            raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB")
        self.sizes.append(size)


def _run(root: Path, limit: Limit | None = None, config: TrainConfig = CONFIG) -> Run:
    base = small_base()
    if limit is not None:
        build = base.denoiser.build

        def limited(dtype: torch.dtype) -> Any:
            unet = build(dtype)
            unet.register_forward_pre_hook(limit, with_kwargs=True)
            return unet

        base = with_network(base, limited)
    return Run(base, small_subject(), small_class_images(), config, root, torch.device("cpu"))


def _tensors(run: Run) -> dict[str, torch.Tensor]:
    path = run.folder.finished_lora(run.folder.load_checkpoint(99).step)
    assert path is not None
    return safetensors.torch.load_file(path)


@pytest.mark.parametrize(
    ("pictures", "expected"),
    [
        (4, []),
        (3, ["gradient checkpointing is now on", "the micro-batch size is now 2 instead of 4"]),
        (
            1,
            [
                "gradient checkpointing is now on",
                "the micro-batch size is now 2 instead of 4",
                "the micro-batch size is now 1 instead of 2",
            ],
        ),
    ],
)
def test_fewer_pictures_at_once_learn_the_same(tmp_path: Path, pictures: int, expected: list[str]) -> None:
    whole = _run(tmp_path / "whole")
    reference = [event for event in whole.events() if isinstance(event, StepDone)]
    limit = Limit(pictures)
    tight = _run(tmp_path / "tight", limit)
    events = list(tight.events())
    notes = [event.note for event in events if isinstance(event, Adjusted)]
    assert [note.removeprefix("out of memory: ") for note in notes] == expected
    assert set(limit.sizes) == {min(pictures, 4) if pictures != 3 else 2}
    steps = [event for event in events if isinstance(event, StepDone)]
    for found, wanted in zip(steps, reference, strict=True):
        assert found.loss == pytest.approx(wanted.loss, rel=1e-4)
        assert found.losses["instance_loss"] == pytest.approx(wanted.losses["instance_loss"], rel=1e-4)
        assert found.losses["prior_loss"] == pytest.approx(wanted.losses["prior_loss"], rel=1e-4)
        assert found.grad_norm == pytest.approx(wanted.grad_norm, rel=1e-3)


@pytest.mark.oldest
def test_checkpointing_alone_changes_no_bit(tmp_path: Path) -> None:
    whole = _run(tmp_path / "whole")
    list(whole.events())
    tight = _run(tmp_path / "tight", Limit(4, after=2, needs_checkpointing=True))
    notes = [event for event in tight.events() if isinstance(event, Adjusted)]
    assert [(event.step, event.note) for event in notes] == [(2, "out of memory: gradient checkpointing is now on")]
    first, second = _tensors(whole), _tensors(tight)
    assert all(torch.equal(first[name], second[name]) for name in first)


def test_a_resumed_run_keeps_what_it_stepped_down_to(tmp_path: Path) -> None:
    reading = _run(tmp_path, Limit(1)).events()
    for event in reading:
        if isinstance(event, StepDone) and event.step == 2:
            reading.close()
            break
    limit = Limit(1)
    assert not [event for event in _run(tmp_path, limit).events() if isinstance(event, Adjusted)]
    assert set(limit.sizes) == {1}


@pytest.mark.oldest
def test_the_last_thing_to_try_is_the_8_bit_optimizer(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """bitsandbytes cannot be run here: its class is AdamW under its name, with its states where bitsandbytes 0.50 puts
    them, and a CPU is taken for a GPU."""
    import sys
    import types

    from subjectbooth.trainer.learn import optimizers

    class AdamW8bit(torch.optim.AdamW):
        made = 0

        def __init__(self, *arguments: Any, **keywords: Any) -> None:
            super().__init__(*arguments, **keywords)
            AdamW8bit.made += 1

        def state_dict(self) -> dict[str, Any]:
            saved = super().state_dict()
            nested = {
                index: {
                    "step": entries["step"],
                    "__bnb_optimizer_quant_state__": {name: value for name, value in entries.items() if name != "step"},
                }
                for index, entries in saved["state"].items()
            }
            return {**saved, "state": nested}

    package = types.ModuleType("bitsandbytes")
    package.optim = types.SimpleNamespace(AdamW8bit=AdamW8bit)
    monkeypatch.setitem(sys.modules, "bitsandbytes", package)
    monkeypatch.setattr(optimizers, "_missing", lambda name, device: "")

    class UntilEightBit(Limit):
        def __call__(self, *arguments: Any) -> None:
            self.pictures = 1 if AdamW8bit.made else 0
            super().__call__(*arguments)

    run = _run(tmp_path, UntilEightBit(0, after=2))
    events = []
    reading = run.events()
    for event in reading:
        events.append(event)
        if isinstance(event, StepDone) and event.step == 3:
            reading.close()
            break
    notes = [
        (event.step, event.note.removeprefix("out of memory: ")) for event in events if isinstance(event, Adjusted)
    ]
    assert notes == [
        (2, "gradient checkpointing is now on"),
        (2, "the micro-batch size is now 2 instead of 4"),
        (2, "the micro-batch size is now 1 instead of 2"),
        (2, "the optimizer is now adamw8bit, starting with empty state"),
    ]
    kept = run.folder.load_checkpoint(4)
    assert kept.step == 3
    assert all(int(state["step"]) == 1 for state in kept.optimizer.values())  # of the new optimizer
    # What it resumes with is what it stepped down to, its averages included.
    again = list(_run(tmp_path).events())
    assert again[0].chosen["optimizer"] == "adamw8bit"
    assert AdamW8bit.made == 2
    assert all(int(state["step"]) == 2 for state in run.folder.load_checkpoint(4).optimizer.values())
    with safetensors.safe_open(run.folder.finished_lora(4), "pt") as file:
        assert file.metadata()["ss_optimizer"] == "adamw8bit"


def test_without_bitsandbytes_there_is_no_8_bit_optimizer_to_step_down_to() -> None:
    chosen = ResolvedSettings("adamw", gradient_checkpointing=True, micro_batch=1)
    assert step_down(chosen, 2, eight_bit=False) is None
    assert step_down(dataclasses.replace(chosen, optimizer="adafactor"), 2, eight_bit=True) is None


def test_when_nothing_is_left_it_says_what_to_do_and_keeps_the_steps(tmp_path: Path) -> None:
    with pytest.raises(SubjectBoothError, match="Lower resolution or rank") as failure:
        list(_run(tmp_path, Limit(0, after=2)).events())
    assert "the adapter of step 2 is kept" in str(failure.value)
    assert _run(tmp_path).folder.load_checkpoint(4).step == 2


def test_no_memory_for_pictures_does_not_end_the_run(tmp_path: Path) -> None:
    config = dataclasses.replace(
        CONFIG, validation_prompts=("a photo of {subject}",), train_batch_size=1, validation_interval=0
    )
    base = small_base()

    class NoDecoder:
        def encode(self, images: torch.Tensor) -> torch.Tensor:
            return base.codec.encode(images)

        def decode(self, latents: torch.Tensor) -> torch.Tensor:
            raise RuntimeError("DefaultCPUAllocator: can't allocate memory: you tried to allocate 9 bytes")

    run = Run(
        dataclasses.replace(base, codec=NoDecoder()),
        small_subject(),
        small_class_images(),
        config,
        tmp_path,
        torch.device("cpu"),
    )
    events = list(run.events())
    assert "skipped" in next(event.note for event in events if isinstance(event, Adjusted))
    assert run.folder.finished_lora(4) is not None


class StandIn(Exception):
    """An exception class of a torch that is not installed here."""


def test_what_counts_as_out_of_memory(monkeypatch: pytest.MonkeyPatch) -> None:
    assert is_out_of_memory(torch.OutOfMemoryError("x"))
    assert is_out_of_memory(RuntimeError("MPS backend out of memory (MPS allocated: 9 GB)"))
    assert is_out_of_memory(RuntimeError("CUDA error: CUBLAS_STATUS_ALLOC_FAILED when calling cublasCreate(handle)"))
    assert is_out_of_memory(MemoryError())
    assert not is_out_of_memory(RuntimeError("shape mismatch"))
    assert not is_out_of_memory(ValueError("out of memory"))
    # torch 2.4, which has the class under torch.cuda alone
    with monkeypatch.context() as older:
        older.delattr(torch, "OutOfMemoryError")
        older.delattr(torch, "AcceleratorError", raising=False)
        older.setattr(torch.cuda, "OutOfMemoryError", StandIn)
        assert is_out_of_memory(StandIn("x"))
        assert not is_out_of_memory(ValueError("out of memory"))
    # torch 2.9 and newer, and a torch in which that class is no RuntimeError
    monkeypatch.setattr(torch, "AcceleratorError", StandIn, raising=False)
    assert is_out_of_memory(StandIn("CUDA error: out of memory"))
    numbered = StandIn("CUDA error")
    numbered.error_code = 2  # type: ignore[attr-defined]
    assert is_out_of_memory(numbered)
    assert not is_out_of_memory(StandIn("CUDA error: an illegal memory access was encountered"))


def test_a_batch_is_never_empty() -> None:
    assert step_down(ResolvedSettings("adamw", gradient_checkpointing=True, micro_batch=1), 2) is None
    assert step_down(ResolvedSettings("adamw", gradient_checkpointing=True, micro_batch=2), 1) is None
