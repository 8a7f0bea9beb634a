"""What a run will take is told from the last run of its base, scaled to the new settings."""

from __future__ import annotations

import io
import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from subjectbooth.trainer.config import TrainConfig
from subjectbooth.trainer.runs.estimate import Estimate, estimate, latest_runs
from subjectbooth.trainer.runs.folder import RunFolder
from subjectbooth.trainer.runs.writer import FolderWriter

BEFORE = TrainConfig(steps=400, resolution=512, rank=16)
COUNTS = {"base": 2_000_000_000, "adapter": 20_000_000, "optimizer": 40_000_000, "preservation": 0, "text": 0,
          "pictures": 1, "whole": 4_000_000_000, "checkpointed": 1_000_000_000}  # fmt: skip
CHOSEN = {"optimizer": "adamw", "device": "cuda:0", "precision": "bf16", "gradient_checkpointing": "off",
          "pictures_per_forward": "1", "attention": "sdpa"}  # fmt: skip


def _run(root: Path, number: int, config: TrainConfig = BEFORE, seconds: float = 0.5, **more: Any) -> RunFolder:
    folder = RunFolder(root, f"{number:064x}"[::-1], "ohwx dog")
    record = {"config": config.to_json(), "trigger": "ohwx dog", "preservation": "none"}
    FolderWriter(folder).open({**record, **more.pop("record", {})})
    started = {"event": "Started", "step": 0, "chosen": CHOSEN, "memory": COUNTS, **more}
    steps = [{"event": "StepDone", "step": 1, "seconds": 60.0}]  # the warm-up
    # Longer than both ends that are read.
    steps += [{"event": "StepDone", "step": step, "seconds": 9.0, "loss": 0.1} for step in range(2, 2000)]
    steps += [{"event": "StepDone", "step": step, "seconds": seconds} for step in range(2000, 2021)]
    folder.log_path.write_text("\n".join(map(json.dumps, [started, *steps])), "utf-8")
    return folder


def _estimate(root: Path, config: TrainConfig, way: str = "none", free: int | None = 10**10) -> Estimate:
    found = estimate(latest_runs(root), config, way, free)
    assert found is not None and found.plan is not None
    return found


def test_the_same_settings_take_what_they_took(tmp_path: Path) -> None:
    _run(tmp_path, 1)
    found = _estimate(tmp_path, replace(BEFORE, steps=1000, validation_interval=0))
    assert (found.step, found.seconds, found.is_scaled) == (0.5, 500.0, False)
    assert found.plan is not None and found.plan.fits and found.plan.needed == 6_060_000_000
    drawn = replace(BEFORE, steps=1000, validation_prompts=("a", "b"), validation_interval=500, validation_steps=30)
    # 2 x 2 images of 30 steps, each two forward passes of a third of a step; and scores of the base and of two steps.
    drawing = (4 * 30 * 2 + 8 + 2 * 14) * 0.5 / 3
    assert _estimate(tmp_path, drawn).seconds == pytest.approx(500 + drawing)
    studied = _estimate(tmp_path, drawn, "curvature")  # 64 images, and 32 to calibrate, before the first step
    assert studied.seconds == pytest.approx(500 + drawing + 96 * 0.5)


def test_others_are_scaled(tmp_path: Path) -> None:
    _run(tmp_path, 1)
    larger = replace(BEFORE, resolution=1024, train_batch_size=2, gradient_accumulation_steps=3, rank=32)
    found = _estimate(tmp_path, larger, "class_images", free=10**12)
    assert found.is_scaled and found.step == pytest.approx(0.5 * 4 * 2 * 3 * 2)
    assert found.plan is not None and found.plan.pictures == 4 and found.plan.adapter == 40_000_000
    assert found.plan.activations == 4 * 16_000_000_000


def test_memory_is_lowered_before_it_does_not_fit(tmp_path: Path) -> None:
    _run(tmp_path, 1)
    for free, checkpointing, fits in ((10**10, False, True), (5 * 10**9, True, True), (3 * 10**9, True, False)):
        plan = _estimate(tmp_path, BEFORE, free=free).plan
        assert plan is not None and (plan.chosen.gradient_checkpointing, plan.fits) == (checkpointing, fits)
    plan = _estimate(tmp_path, replace(BEFORE, gradient_checkpointing="off"), free=5 * 10**9).plan
    assert plan is not None and not plan.fits and "will probably not fit" in plan.warning


def test_the_latest_with_the_same_settings_counts(tmp_path: Path) -> None:
    import os

    other = replace(BEFORE, resolution=256)
    for number, config, seconds, changed in ((1, BEFORE, 1.0, 1000), (2, BEFORE, 2.0, 2000), (3, other, 7.0, 3000)):
        run = _run(tmp_path, number, config, seconds)
        for path in run.path.rglob("*"):
            os.utime(path, (changed, changed))
    assert _estimate(tmp_path, BEFORE).step == 2.0
    assert _estimate(tmp_path, replace(BEFORE, resolution=768)).step == pytest.approx(7.0 * 9)


def test_a_run_is_read_once_until_it_changes(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The editor asks after every change of the graph."""
    first, second = (_run(tmp_path, number, replace(BEFORE, rank=number)) for number in (1, 2))
    opened: list[str] = []
    real = io.open
    monkeypatch.setattr(io, "open", lambda path, *rest: (opened.append(Path(path).parent.name), real(path, *rest))[1])
    before = _estimate(tmp_path, BEFORE)
    assert sorted(opened) == sorted(2 * [first.path.name, second.path.name]), "the record and the log of each"
    opened.clear()
    assert _estimate(tmp_path, BEFORE) == before and opened == []
    with first.log_path.open("a", encoding="utf-8") as log:
        log.writelines("\n" + json.dumps({"event": "StepDone", "step": step, "seconds": 4.0}) for step in range(2, 22))
    opened.clear()
    assert _estimate(tmp_path, BEFORE).step == 4.0 and opened == [first.path.name]


def test_without_a_usable_run_there_is_none(tmp_path: Path) -> None:
    assert estimate([], BEFORE, "none", None) is None
    broken = _run(tmp_path, 1)
    broken.log_path.write_bytes(b"\x00{" * 1000)
    foreign = _run(tmp_path, 2, record={"config": {"epochs": 3}})
    assert estimate(latest_runs(tmp_path), BEFORE, "none", None) is None and foreign.path.is_dir()
    uncounted = _run(tmp_path, 3, memory={})
    found = estimate(latest_runs(tmp_path), BEFORE, "none", 1)
    assert found is not None and found.plan is None and found.folder == uncounted.path
