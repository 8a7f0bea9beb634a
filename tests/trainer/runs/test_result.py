"""Which step of a run is its result, and why; folders of before say it in another file, or not at all."""

from __future__ import annotations

import json
import logging
import shutil
from pathlib import Path
from typing import Any

import pytest

from subjectbooth.tests.small_base import folder_bytes, small_base, small_subject
from subjectbooth.tests.trainer.runs.test_run import CPU, _read
from subjectbooth.trainer.config import TrainConfig
from subjectbooth.trainer.events import Adjusted, Finished, StepDone
from subjectbooth.trainer.files.lock import lock_folder
from subjectbooth.trainer.runs.folder import RunFolder
from subjectbooth.trainer.runs.history import read_history
from subjectbooth.trainer.runs.recipe import Recipe
from subjectbooth.trainer.runs.result import LAST, STOPPED, Result, read_results
from subjectbooth.trainer.runs.run import Run
from subjectbooth.trainer.runs.writer import FolderWriter

CONFIG = TrainConfig(steps=3, learning_rate=1e-3, rank=2, network_alpha=2.0, resolution=64)
RECIPE = Recipe(small_base(), small_subject(), CONFIG)
PUBLISHED = {"lora": "rex.safetensors", "size": 9, "matched": 4, "layers": 4, "trigger": "ohwx dog"}


def _run(root: Path, steps: int = 3) -> Run:
    return RECIPE.vary(steps=steps).run(root, CPU)


def _stopped(root: Path, step: int, steps: int = 3) -> Run:
    run = _run(root, steps)
    for event in run.events():
        if isinstance(event, StepDone) and event.step == step:
            run.stop_and_keep()
    return run


def _as_before(run: Run, kept: dict[str, int] | None, published: dict[str, Any] | None) -> None:
    """Make of the folder what earlier versions would have written."""
    (run.folder.path / "result.json").unlink()
    for name, values in (("kept.json", kept), ("result.json", published)):
        if values is not None:
            (run.folder.path / name).write_text(json.dumps(values), "utf-8")


@pytest.fixture(scope="module")
def finished(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Runs of 3 steps, finished; to be copied."""
    root = tmp_path_factory.mktemp("finished")
    _read(_run(root).events())
    return root


@pytest.fixture
def root(finished: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(finished, tmp_path / "runs"))


def test_each_number_of_steps_has_its_own_result(tmp_path: Path) -> None:
    run = _stopped(tmp_path, 1)
    assert run.result == run.folder.result(3) == Result(1, 3, STOPPED)
    longer = _run(tmp_path, 4)
    assert longer.result is None
    _read(longer.events())
    assert longer.result == Result(4, 4, LAST)
    assert run.folder.results().results == {3: Result(1, 3, STOPPED), 4: Result(4, 4, LAST)}
    # What the front end notes goes beside it, and a run that goes on is not stopped any more.
    run.writer.record_published({**PUBLISHED, "step": 1, "steps": 3})
    assert run.folder.result(3) == Result(1, 3, STOPPED)
    history = read_history(run.folder.path)
    assert (history["steps"], history["kept"]) == (4, None)
    assert history["result"] == {**PUBLISHED, "step": 1, "steps": 3}
    again = _run(tmp_path)
    assert _read(again.events()) == [Finished(1, run.folder.lora_path(1), trained=False)]
    assert again.result == Result(1, 3, STOPPED)


def test_a_stopped_run_of_before_is_stopped_and_goes_on(tmp_path: Path) -> None:
    """It has kept.json, and a result.json that only the node wrote."""
    run = _stopped(tmp_path, 2)
    published = {**PUBLISHED, "step": 2, "steps": 3}
    _as_before(run, {"step": 2, "steps": 3}, published)
    before = folder_bytes(tmp_path)
    history = read_history(run.folder.path)
    assert (history["kept"], history["result"]) == (2, published)
    assert _read(_run(tmp_path).events()) == [Finished(2, run.folder.lora_path(2), trained=False)]
    assert folder_bytes(tmp_path) == before, "what is found again is only read"

    resumed = _run(tmp_path)
    cancelled = resumed.events(resume_stopped=True)
    next(cancelled)
    cancelled.close()
    history = read_history(run.folder.path)
    assert (history["kept"], history["result"]) == (None, published), "neither stopped nor finished any more"
    assert _read(_run(tmp_path).events())[-1] == Finished(3, run.folder.lora_path(3), trained=True)
    assert not (run.folder.path / "kept.json").exists()
    assert json.loads((run.folder.path / "result.json").read_text("utf-8")) == {
        "results": {"3": {"step": 3, "why": "last"}},
        **published,
    }


@pytest.mark.parametrize("published", [None, {**PUBLISHED, "step": 3, "steps": 3}])
def test_a_finished_run_of_before_is_found_again(root: Path, published: dict[str, Any] | None) -> None:
    run = _run(root)
    if published is None:
        (run.folder.path / "result.json").unlink()
    else:
        _as_before(run, None, published)
    with lock_folder(run.folder.path):  # somebody else is at work there: nothing is written
        assert _read(_run(root).events()) == [Finished(3, run.folder.lora_path(3), trained=False)]
    assert not read_results(run.folder.path).results
    assert _read(run.events()) == [Finished(3, run.folder.lora_path(3), trained=False)]
    assert read_results(run.folder.path).results == {3: Result(3, 3, LAST)}
    assert (read_history(run.folder.path)["result"], run.result) == (published, Result(3, 3, LAST))


@pytest.mark.parametrize("content", [
    b"", b"[]", b"null", b'{"results": {"3": {"step": 3', b"\xff\x00", b"[" * 5000, b'{"results": 7}',
    b'{"results": {"3": {"step": 9, "why": "last"}}}', b'{"results": {"3": {"step": true, "why": "last"}}}',
    b'{"results": {"x": {"step": 3, "why": "last"}}}', b'{"results": {"3": {"step": 3}}}', b'{"results": {"3": []}}',
])  # fmt: skip
def test_a_damaged_result_is_reported_and_rebuilt_from_the_adapters(
    root: Path, content: bytes, caplog: pytest.LogCaptureFixture
) -> None:
    run = _run(root)
    path = run.folder.path / "result.json"
    whole = path.read_bytes()
    path.write_bytes(content)
    with caplog.at_level(logging.WARNING):
        told, found = _read(run.events())
    assert isinstance(told, Adjusted) and "result.json was damaged and is rebuilt" in told.note
    assert str(path) in caplog.text
    assert found == Finished(3, run.folder.lora_path(3), trained=False)
    assert path.read_bytes() == whole
    assert _read(_run(root).events()) == [found], "it is reported once"


def test_damage_to_one_result_costs_only_that_one(root: Path) -> None:
    run = _run(root)
    path = run.folder.path / "result.json"
    path.write_text('{"results": {"3": {"step": 3, "why": "last"}, "9": {"step": "x"}}, "lora": "rex"}', "utf-8")
    _read(run.events())
    assert json.loads(path.read_text("utf-8")) == {"results": {"3": {"step": 3, "why": "last"}}, "lora": "rex"}


def test_a_damaged_result_of_an_unfinished_run_trains_on_from_its_checkpoint(tmp_path: Path) -> None:
    run = _stopped(tmp_path, 2)
    (run.folder.path / "result.json").write_bytes(b"\x00")
    events = _read(_run(tmp_path).events())
    assert [event.step for event in events if isinstance(event, StepDone)] == [3]
    assert [event.note for event in events if isinstance(event, Adjusted)] == [
        "result.json was damaged and is rebuilt from the adapters"
    ]
    assert run.folder.result(3) == Result(3, 3, LAST)


def test_another_writer_of_the_file_is_enough_to_choose_another_step(tmp_path: Path) -> None:
    """No part of the key, and a run that is told to go on is not stopped by it."""
    config = {"validation_prompts": ("a photo of {subject}",), "validation_interval": 1, "validation_steps": 1}
    recipe = RECIPE.vary(**config)
    run = recipe.run(tmp_path, CPU)
    _read(run.events())
    run.writer.write_result(Result(2, 3, "of another kind"))
    for resume_stopped in (False, True):
        again = recipe.run(tmp_path, CPU)
        assert again.folder.path == run.folder.path
        assert _read(again.events(resume_stopped=resume_stopped)) == [
            Finished(2, run.folder.lora_path(2), trained=False)
        ]
        assert again.result is not None and not again.result.is_stopped
    assert run.folder.kept_step(3) is None and read_history(run.folder.path)["kept"] is None
    # Its adapter is gone: the last one still is there, and what was chosen stays chosen.
    run.folder.lora_path(2).unlink()
    assert _read(recipe.run(tmp_path, CPU).events())[-1].step == 3
    assert run.folder.result(3) == Result(2, 3, "of another kind")
    # Trained again, it is the last one: nobody has chosen of the new ones.
    _read(recipe.run(tmp_path, CPU).events(force_retrain=True))
    assert run.folder.result(3) == Result(3, 3, LAST)


def test_a_forced_training_that_is_cancelled_leaves_no_result(root: Path) -> None:
    run = _run(root)
    run.writer.record_published(PUBLISHED)
    events = run.events(force_retrain=True)
    next(event for event in events if isinstance(event, StepDone))
    events.close()
    assert run.folder.results().results == {} and dict(run.folder.results().published) == PUBLISHED
    assert run.result is None


def test_nothing_is_written_where_nothing_changes(tmp_path: Path) -> None:
    folder = RunFolder(tmp_path, "0" * 64, "ohwx dog")
    writer = FolderWriter(folder)
    writer.revoke_stops()
    writer.discard_progress()
    assert not folder.path.exists()
    writer.write_result(Result(3, 3, LAST))
    before = (folder.path / "result.json").stat().st_mtime_ns
    writer.write_result(Result(3, 3, LAST))
    writer.revoke_stops()
    assert (folder.path / "result.json").stat().st_mtime_ns == before
