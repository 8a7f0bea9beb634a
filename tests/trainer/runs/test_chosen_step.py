"""Which adapters a run keeps, and a step that the user chooses as the result: found, never trained, and taken back."""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Any

import pytest
import safetensors.torch
import torch

from subjectbooth.tests.small_base import folder_bytes, small_base, small_subject
from subjectbooth.tests.trainer.runs.test_run import CPU, _read
from subjectbooth.trainer.config import MOST_KEPT, TrainConfig
from subjectbooth.trainer.errors import SubjectBoothError
from subjectbooth.trainer.events import Adjusted, CheckpointSaved, Event, Finished, StepDone, ValidationStep
from subjectbooth.trainer.files.lock import lock_folder
from subjectbooth.trainer.files.safetensors_file import read_metadata
from subjectbooth.trainer.runs.recipe import Recipe
from subjectbooth.trainer.runs.result import CHOSEN, LAST, STOPPED, Result
from subjectbooth.trainer.runs.run import Run

CONFIG = TrainConfig(
    steps=5, learning_rate=1e-3, rank=2, network_alpha=2.0, resolution=64, validation_interval=2, ema_decay=0.5
)
RECIPE = Recipe(small_base(), small_subject(), CONFIG)


def _run(root: Path, **settings: Any) -> Run:
    return RECIPE.vary(**settings).run(root, CPU)


def _chosen(root: Path, step: int, **settings: Any) -> Run:
    """A run of which a step was chosen; the only event is the end."""
    run = _run(root, **settings)
    assert _read(run.events(use_step=step)) == [Finished(step, run.folder.lora_path(step), trained=False)]
    return run


def _refusal(run: Run, step: int, **how: Any) -> SubjectBoothError:
    with pytest.raises(SubjectBoothError) as refused:
        _read(run.events(use_step=step, **how))
    assert refused.value.where == "use_step"
    return refused.value


def _tensors(run: Run, step: int) -> dict[str, torch.Tensor]:
    assert run.folder.lora_is_valid(step)
    return safetensors.torch.load_file(run.folder.lora_path(step))


@pytest.fixture(scope="module")
def finished(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A finished run of 5 steps without validation images; to be copied."""
    root = tmp_path_factory.mktemp("finished")
    _read(_run(root).events())
    return root


@pytest.fixture
def root(finished: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(finished, tmp_path / "runs"))


def test_the_adapter_of_every_validation_step_is_kept_without_images_too(root: Path, tmp_path: Path) -> None:
    run = _run(root)
    assert run.folder.kept_steps() == [2, 4, 5]
    for step in (2, 4):
        # The same as of a run that ends there.
        short = _run(tmp_path / "short", steps=step)
        _read(short.events())
        kept, expected = _tensors(run, step), _tensors(short, step)
        assert all(torch.equal(kept[name], expected[name]) for name in expected)
        assert read_metadata(run.folder.lora_path(step))["subjectbooth.step"] == str(step)
    rare = _run(tmp_path / "rare", validation_interval=0)
    _read(rare.events())
    assert (rare.folder.kept_steps(), rare.folder.key) == ([5], run.folder.key)
    last, without = _tensors(run, 5), _tensors(rare, 5)
    assert all(torch.equal(last[name], without[name]) for name in last)


@pytest.mark.parametrize(("steps", "interval"), [(500, 100), (3200, 100), (3300, 100), (5000, 10), (10**6, 1), (7, 3)])
def test_a_run_keeps_a_bounded_number(steps: int, interval: int) -> None:
    config = TrainConfig(steps=steps, validation_interval=interval)
    kept = list(range(config.kept_interval, steps + 1, config.kept_interval))
    assert all(config.step_is_kept(step) for step in [*kept, steps])
    assert not config.step_is_kept(kept[0] + 1) and config.kept_interval % interval == 0
    assert len(kept) <= MOST_KEPT
    assert config.kept_interval == interval or 2 * len(kept) >= MOST_KEPT - 1, "no fewer than need be"


def test_a_stop_or_cancel_while_images_of_a_step_that_is_not_kept_are_drawn(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The images are of the averaged weights; the checkpoint must have the run's own."""
    monkeypatch.setattr("subjectbooth.trainer.config.MOST_KEPT", 1)
    shown = {"validation_prompts": ("{subject}",), "validation_interval": 1, "validation_steps": 1}
    whole = _run(tmp_path / "whole", **shown)
    events = _read(whole.events())
    assert whole.folder.kept_steps() == [4, 5]
    assert [event.step for event in events if isinstance(event, CheckpointSaved)] == [1, 2, 3, 4, 5]
    for way in ("stop", "cancel"):
        run = _run(tmp_path / way, **shown)
        for event in (events := run.events()):
            if isinstance(event, ValidationStep) and event.step == 2:
                if way == "cancel":
                    events.close()
                run.stop_and_keep()
        assert run.folder.kept_steps() == [2]
        assert _read(_run(tmp_path / way, **shown).events(resume_stopped=True))[-1].step == 5
        last, expected = _tensors(run, 5), _tensors(whole, 5)
        assert all(torch.equal(last[name], expected[name]) for name in expected)


def test_a_chosen_step_is_the_result_until_it_is_taken_back(root: Path) -> None:
    own = _run(root)
    assert _read(own.events()) == [Finished(5, own.folder.lora_path(5), trained=False)]
    before = folder_bytes(root)
    run = _chosen(root, 2)
    assert run.result == Result(2, 5, CHOSEN) and run.trained_steps == 5
    assert run.folder.results().chosen == {5: 2}
    assert run.folder.results().results == {5: Result(5, 5, LAST)}, "the run's own result is not lost"
    run.writer.record_published({"lora": "rex.safetensors", "chosen": 9, "why": CHOSEN})
    assert run.folder.results().published == {"lora": "rex.safetensors", "why": CHOSEN}
    assert run.folder.results().chosen == {5: 2}
    assert _chosen(root, 4).folder.results().chosen == {5: 4}
    assert _read(own.events()) == [Finished(5, own.folder.lora_path(5), trained=False)]
    assert own.result == Result(5, 5, LAST)
    own.writer.record_published({})
    assert folder_bytes(root) == before


def test_nothing_is_trained_while_a_step_of_an_unfinished_run_is_chosen(tmp_path: Path) -> None:
    _read(_run(tmp_path).events(), until_step=3)
    run = _chosen(tmp_path, 2)
    refused = _refusal(run, 4)
    assert refused.given == "use_step 4, but this run is trained up to step 3 so far" and "use 3," in refused.todo
    assert _chosen(tmp_path, 3).trained_steps == 3
    # Taken back, it trains on: it has no result of its own yet.
    events: list[Event] = _read(run.events())
    assert [event.step for event in events if isinstance(event, StepDone)] == [4, 5]
    assert run.folder.results().chosen == {}


def test_a_stopped_run_is_stopped_again_when_the_choice_is_taken_back(tmp_path: Path) -> None:
    run = _run(tmp_path)
    for event in run.events():
        if isinstance(event, StepDone) and event.step == 3:
            run.stop_and_keep()
    # What is chosen is not trained on, whatever is wanted of stopped runs.
    assert _read(run.events(resume_stopped=True, use_step=2)) == [Finished(2, run.folder.lora_path(2), trained=False)]
    assert _read(run.events()) == [Finished(3, run.folder.lora_path(3), trained=False)]
    assert run.result == Result(3, 5, STOPPED)


@pytest.mark.parametrize(
    ("step", "given", "nearest"),
    [
        (3, "has not kept the LoRA of that step", "use 2 or 4,"),
        (1, "has not kept the LoRA of that step", "use 2,"),
        (6, "use_step 6 with 5 steps", "use 5,"),
        (-1, "has not kept the LoRA of that step", "use 2,"),
    ],
)
def test_a_step_that_is_not_kept_is_refused_with_the_nearest(root: Path, step: int, given: str, nearest: str) -> None:
    before = folder_bytes(root)
    refused = _refusal(_run(root), step)
    assert given in refused.given and nearest in refused.todo
    assert folder_bytes(root) == before


def test_a_damaged_or_deleted_adapter_cannot_be_chosen(root: Path) -> None:
    run = _run(root)
    path = run.folder.lora_path(4)
    path.write_bytes(path.read_bytes()[:-9])
    refused = _refusal(run, 4)
    assert refused.given == "use_step 4, but lora_000004.safetensors is damaged" and "use 2 or 5," in refused.todo
    # Another run's file under this name is as bad.
    shutil.copy(run.folder.lora_path(2), path)
    other = _run(root, seed=1)
    _read(other.events())
    shutil.copy(other.folder.lora_path(4), path)
    assert "damaged" in _refusal(run, 4).given
    path.unlink()
    run.folder.lora_path(5).write_bytes(b"")
    assert "has not kept" in (refused := _refusal(run, 4)).given and "use 2," in refused.todo


def test_a_run_that_was_never_trained_and_a_forced_one_are_refused(root: Path) -> None:
    fresh = _run(root, seed=1)
    assert "no LoRA of any step yet" in _refusal(fresh, 2).given
    assert not fresh.folder.path.exists()
    assert _refusal(_run(root), 2, force_retrain=True).given == "force_retrain together with use_step 2"
    assert _run(root).folder.load_checkpoint(5) is not None, "nothing is lost"


def test_a_choice_needs_no_right_to_write(root: Path) -> None:
    run = _run(root)
    with lock_folder(run.folder.path):  # another program is at work there
        assert _read(run.events(use_step=2)) == [Finished(2, run.folder.lora_path(2), trained=False)]
    assert run.result == Result(2, 5, CHOSEN) and run.folder.results().chosen == {}


@pytest.mark.parametrize("content", ["7", '{"5": 9}', '{"5": "2"}', '{"x": 2}', '{"5": true}', "[]"])
def test_a_spoilt_choice_is_none(root: Path, content: str) -> None:
    run = _run(root)
    path = run.folder.path / "result.json"
    path.write_text('{"results": {"5": {"step": 5, "why": "last"}}, "chosen": ' + content + "}", "utf-8")
    assert run.folder.results().chosen == {}
    assert not [event for event in _read(run.events()) if isinstance(event, Adjusted)]
    assert run.result == Result(5, 5, LAST)
