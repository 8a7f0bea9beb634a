"""keep = best: which step is chosen, from hand-made scores and in runs."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Mapping
from pathlib import Path

import pytest
import torch

from subjectbooth.tests.small_base import folder_bytes, small_base, small_subject
from subjectbooth.trainer.config import TrainConfig, run_key
from subjectbooth.trainer.errors import SubjectBoothError
from subjectbooth.trainer.events import Event, Finished, StepDone
from subjectbooth.trainer.learn.probe import Probe
from subjectbooth.trainer.runs.best_step import Choice, best_step, share_curves
from subjectbooth.trainer.runs.recipe import Recipe
from subjectbooth.trainer.runs.result import BEST, CHOSEN, LAST, STOPPED, Result
from subjectbooth.trainer.runs.run import Run
from subjectbooth.trainer.runs.writer import SilentWriter

CPU = torch.device("cpu")
CONFIG = TrainConfig(steps=4, rank=2, network_alpha=2.0, resolution=64, validation_interval=1, precision="fp32")
RECIPE = Recipe(small_base(), small_subject(), dataclasses.replace(CONFIG, keep="best"))
BASE = {"photo_loss": 0.5, "class_drift": 0.0, "scene_kept": 1.0}


def scores(learned: float, scene: float, drift: float = 0.0) -> dict[str, float]:
    return {"photo_loss": 0.5 * (1 - learned), "class_drift": drift, "scene_kept": scene}


OVERFITTED = {0: BASE, 1: scores(0.4, 0.9), 2: scores(0.7, 0.9), 3: scores(0.9, 0.5), 4: scores(0.95, 0.4)}


@pytest.mark.parametrize(
    ("found", "kept", "step"),
    [
        (OVERFITTED, {1, 2, 3, 4}, 2),
        (OVERFITTED, {1, 3, 4}, 3),
        ({0: BASE, 1: scores(0.4, 0.9), 2: scores(0.6, 0.9), 3: scores(0.7, 0.88)}, {1, 2, 3}, 3),
        ({0: BASE, 1: scores(0.5, 0.8), 2: scores(0.5, 0.8)}, {1, 2}, 2),
        ({0: BASE, 1: scores(0.5, 1.4), 2: scores(0.55, 1.0)}, {1, 2}, 2),
        ({0: BASE, 1: scores(0.5, 0.9, 0.1), 2: scores(0.6, 0.9, 2.0)}, {1, 2}, 2),
        ({0: BASE, 1: scores(-0.1, 1.0), 2: scores(-0.2, 1.0)}, {1, 2}, 2),
        ({0: BASE, 1: scores(0.5, 0.9), 2: {"brightness": 1.0}}, {1, 2}, 1),
        ({1: scores(0.5, 0.9)}, {1}, None),
        ({0: {**BASE, "photo_loss": 0.0}, 1: scores(0.5, 0.9)}, {1}, None),
        (OVERFITTED, set(), None),
        ({}, {1}, None),
    ],
    ids=["overfitted", "not kept", "still learning", "equal: the later one", "no more than all of a scene",
         "the class does not count", "worse than the base", "a step without scores", "no base", "nothing to learn",
         "nothing kept", "no scores"],
)  # fmt: skip
def test_the_rule(found: Mapping[int, Mapping[str, float]], kept: set[int], step: int | None) -> None:
    choice = best_step(found, kept)
    assert (choice.step if choice else None) == step


def test_the_reason_names_the_shares() -> None:
    assert best_step(OVERFITTED, {2}) == Choice(2, "photos learned 70%, scenes kept 90%, class kept 100%")
    assert share_curves({0: BASE, 2: scores(0.5, 0.9, 0.25)}) == {
        "subject": [[0, 0.0], [2, 0.5]],
        "scenes": [[0, 1.0], [2, 0.9]],
        "class": [[0, 1.0], [2, 0.8]],
    }


@pytest.fixture
def overfits(monkeypatch: pytest.MonkeyPatch) -> None:
    """Runs have the scores of OVERFITTED."""

    def fake(self: Probe, with_adapter: bool = True) -> dict[str, float]:
        self.asked = getattr(self, "asked", -1) + 1  # type: ignore[attr-defined]
        return dict(OVERFITTED[self.asked])  # type: ignore[attr-defined]

    monkeypatch.setattr(Probe, "scores", fake)


def _read(run: Run, **how: int) -> list[Event]:
    return list(run.events(**how))  # type: ignore[arg-type]


@pytest.mark.usefixtures("overfits")
def test_the_best_step_is_the_result(tmp_path: Path) -> None:
    run = RECIPE.run(tmp_path, CPU)
    *_, finished = _read(run)
    assert finished == Finished(2, run.folder.lora_path(2), trained=True)
    assert (run.result, run.trained_steps) == (Result(2, 4, BEST), 4)
    assert run.reason == "photos learned 70%, scenes kept 90%, class kept 100%"
    written = json.loads((run.folder.path / "result.json").read_text("utf-8"))
    assert written["results"] == {"4": {"step": 2, "why": "best"}}

    again = RECIPE.run(tmp_path, CPU)
    assert _read(again) == [Finished(2, run.folder.lora_path(2), trained=False)] and again.reason == run.reason
    last = RECIPE.vary(keep="last").run(tmp_path, CPU)
    assert last.folder.path == run.folder.path, "another result, the same run"
    assert _read(last) == [Finished(4, run.folder.lora_path(4), trained=False)]
    assert (last.result, last.reason, last.folder.result(4)) == (Result(4, 4, LAST), "", Result(4, 4, LAST))
    chosen = RECIPE.run(tmp_path, CPU)
    assert _read(chosen, use_step=3)[-1].step == 3 and chosen.result == Result(3, 4, CHOSEN)
    before = folder_bytes(tmp_path)
    silent = RECIPE.run(tmp_path, CPU, make_writer=SilentWriter)
    assert _read(silent)[-1].step == 2 and folder_bytes(tmp_path) == before
    assert _read(RECIPE.run(tmp_path, CPU))[-1].step == 2
    assert run.folder.result(4) == Result(2, 4, BEST)

    # A damaged or deleted adapter cannot be the best one.
    run.folder.lora_path(2).write_bytes(b"damaged")
    assert _read(RECIPE.run(tmp_path, CPU))[-1].step == 3
    run.folder.lora_path(3).unlink()
    run.folder.lora_path(1).unlink()
    assert _read(RECIPE.run(tmp_path, CPU))[-1].step == 4
    # A log without scores, such as of an earlier version: the last step.
    run.folder.log_path.unlink()
    unscored = RECIPE.run(tmp_path, CPU)
    assert _read(unscored)[-1].step == 4 and unscored.result == Result(4, 4, LAST)


@pytest.mark.usefixtures("overfits")
def test_a_run_that_is_stopped_and_kept_is_kept_where_it_was_stopped(tmp_path: Path) -> None:
    run = RECIPE.run(tmp_path, CPU)
    for event in run.events():
        if isinstance(event, StepDone) and event.step == 3:
            run.stop_and_keep()
    assert run.result == Result(3, 4, STOPPED)


def test_keep_is_checked_and_changes_no_key() -> None:
    keys = {run_key(dataclasses.replace(CONFIG, keep=keep), "photos", "base", None) for keep in ("best", "last")}
    assert len(keys) == 1
    with pytest.raises(SubjectBoothError, match="keep 'first'"):
        dataclasses.replace(CONFIG, keep="first")
