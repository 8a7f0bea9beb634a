"""The pictures of a step side by side in threads: the same gradients, no more pictures at once, nothing left behind."""

from __future__ import annotations

import dataclasses
import threading
import time
from pathlib import Path
from typing import Any

import pytest
import safetensors.torch
import torch

from subjectbooth.tests.small_base import small_base, small_class_images, small_subject, with_network
from subjectbooth.trainer.config import TrainConfig
from subjectbooth.trainer.events import StepDone
from subjectbooth.trainer.learn.side_by_side import SideBySide, threads_for
from subjectbooth.trainer.machine.resolved_settings import ResolvedSettings
from subjectbooth.trainer.runs.run import Run

CONFIG = TrainConfig(
    steps=3, learning_rate=1e-3, rank=4, network_alpha=4.0, resolution=64, train_batch_size=2, validation_interval=0
)


pytestmark = pytest.mark.usefixtures("torch_threads")


class Watch:
    """Counts the pictures that are in the UNet at the same time, and the sizes of its batches."""

    def __init__(self) -> None:
        self.lock, self.inside, self.most, self.sizes = threading.Lock(), 0, 0, set[int]()

    def enter(self, module: torch.nn.Module, arguments: tuple[Any, ...], keywords: dict[str, Any]) -> None:
        with self.lock:
            self.sizes.add(len(arguments[0]))
            self.inside += len(arguments[0])
            self.most = max(self.most, self.inside)
        time.sleep(0.02)  # long enough for the other threads to come in

    def leave(self, module: torch.nn.Module, arguments: tuple[Any, ...], output: Any) -> None:
        with self.lock:
            self.inside -= len(arguments[0])


def _run(
    root: Path, threads: int, watch: Watch | None = None, **changes: Any
) -> tuple[list[StepDone], dict[str, torch.Tensor]]:
    torch.set_num_threads(threads)
    base = small_base()
    build = base.denoiser.build

    def watched(dtype: torch.dtype) -> Any:
        unet = build(dtype)
        if watch is not None:
            unet.register_forward_pre_hook(watch.enter, with_kwargs=True)
            unet.register_forward_hook(watch.leave)
        return unet

    config = dataclasses.replace(CONFIG, **changes)
    run = Run(
        with_network(base, watched),
        small_subject(),
        small_class_images(),
        config,
        root,
        torch.device("cpu"),
    )
    steps = [event for event in run.events() if isinstance(event, StepDone)]
    path = run.folder.finished_lora(config.steps)
    assert path is not None
    return steps, safetensors.torch.load_file(path)


@pytest.mark.parametrize("changes", [{}, {"train_text_encoder": True}, {"gradient_accumulation_steps": 2}])
def test_threads_learn_what_one_learns(tmp_path: Path, changes: dict[str, Any]) -> None:
    alone, watch = Watch(), Watch()
    wanted, _ = _run(tmp_path / "alone", 1, alone, **changes)
    found, tensors = _run(tmp_path / "threads", 2, watch, **changes)
    assert (alone.sizes, alone.most) == ({4}, 4)
    assert (watch.sizes, watch.most) == ({2}, 4)
    for one, other in zip(found, wanted, strict=True):
        assert set(one.losses) == {"instance_loss", "prior_loss"}
        for part in ("loss", "losses", "grad_norm"):
            assert getattr(one, part) == pytest.approx(getattr(other, part), rel=1e-4), part
    again = _run(tmp_path / "again", 2, **changes)[1]
    assert tensors.keys() == again.keys() and all(torch.equal(tensors[name], again[name]) for name in tensors)


def test_no_more_pictures_at_once_than_memory_was_planned_for(tmp_path: Path) -> None:
    for pictures, sizes in ((3, {1}), (2, {1}), (1, {1})):
        watch = Watch()
        _run(tmp_path / str(pictures), 4, watch, pictures_per_forward=pictures, steps=1)
        assert (watch.sizes, watch.most) == (sizes, pictures)


def test_pictures_stay_together_where_they_have_to() -> None:
    torch.set_num_threads(8)
    cpu = ResolvedSettings("adamw", "cpu", "fp32")
    assert [threads_for(pictures, cpu, 0.0) for pictures in (1, 4, 20)] == [1, 4, 8]
    assert threads_for(4, cpu, 0.1) == threads_for(4, dataclasses.replace(cpu, precision="bf16"), 0.0) == 1
    assert threads_for(4, dataclasses.replace(cpu, device="cuda"), 0.0) == 1


def test_results_come_in_order_and_of_errors_the_first_one() -> None:
    threads = SideBySide(2)
    ended = []

    def slow() -> str:
        time.sleep(0.05)
        ended.append("slow")
        raise ValueError("the first")

    def quick() -> str:
        raise KeyError("the second")

    try:
        assert threads.run([lambda: (time.sleep(0.05), "one")[1], lambda: "two"]) == ["one", "two"]
        with pytest.raises(ValueError, match="the first"):
            threads.run([slow, quick])
        with pytest.raises(KeyError):
            threads.run([quick, lambda: time.sleep(0.05) or ended.append("other")])
        assert ended == ["slow", "other"]  # nothing is still running when an error comes out
    finally:
        threads.close()


def test_torchs_threads_are_shared_out_and_put_back() -> None:
    torch.set_num_threads(4)
    before = threading.active_count()
    threads = SideBySide(2)
    try:
        assert threads.run([torch.get_num_threads, torch.get_num_threads]) == [2, 2]
        assert torch.get_num_threads() == 4
    finally:
        threads.close()
    seen = []
    later = threading.Thread(target=lambda: seen.append(torch.get_num_threads()))
    later.start()
    later.join()
    assert seen == [4]
    assert threading.active_count() == before
