"""Stop and keep: the steps so far are the result, until the run is told to go on to the steps that were planned."""

from __future__ import annotations

import dataclasses
import threading
from pathlib import Path

import pytest
import safetensors.torch
import torch

from subjectbooth.tests.trainer.runs.test_run import CONFIG, _lora, _read, _run
from subjectbooth.trainer.events import Event, Finished, Started, StepDone, Validation, ValidationStep
from subjectbooth.trainer.runs.run import Run

SHOWN = dataclasses.replace(
    CONFIG, validation_prompts=("a photo of {subject}", "{subject} on grass"), validation_interval=2, validation_steps=3
)


def _stop_after(run: Run, step: int, **how: bool) -> list[Event]:
    seen = []
    for event in run.events(**how):
        seen.append(event)
        if isinstance(event, StepDone) and event.step == step:
            run.stop_and_keep()
    return seen


def _steps(events: list[Event]) -> list[int]:
    return [event.step for event in events if isinstance(event, StepDone)]


def _same_weights(one: bytes, two: bytes) -> bool:
    first, second = safetensors.torch.load(one), safetensors.torch.load(two)
    return first.keys() == second.keys() and all(torch.equal(first[name], second[name]) for name in first)


@pytest.mark.parametrize("schedule", ["constant", "cosine"])
def test_stop_keep_and_go_on_end_as_an_uninterrupted_run(tmp_path: Path, schedule: str) -> None:
    config = dataclasses.replace(SHOWN, lr_scheduler=schedule)
    whole = _run(tmp_path / "whole", config)
    _read(whole.events())
    stopped = _stop_after(_run(tmp_path / "cut", config), 3)
    assert _steps(stopped) == [1, 2, 3]
    folder = _run(tmp_path / "cut", config).folder
    assert stopped[-1] == Finished(3, folder.lora_path(3), trained=True)
    with safetensors.safe_open(folder.lora_path(3), "pt") as file:
        assert (file.metadata()["subjectbooth.step"], file.metadata()["ss_steps"]) == ("3", "3")
    kept = _lora(_run(tmp_path / "cut", config), 3)

    # The same again trains nothing, in another process neither (all that is remembered lies in the folder).
    assert _read(_run(tmp_path / "cut", config).events()) == [Finished(3, folder.lora_path(3), trained=False)]

    going_on = _read(_run(tmp_path / "cut", config).events(resume_stopped=True))
    assert isinstance(going_on[0], Started)
    assert _steps(going_on) == [4, 5, 6]
    # What went on is not kept at 3 any more, whatever is asked next.
    again = _read(_run(tmp_path / "cut", config).events())
    assert again == [Finished(6, folder.lora_path(6), trained=False)]
    assert _lora(_run(tmp_path / "cut", config), 3) == kept
    assert _same_weights(_lora(whole), _lora(_run(tmp_path / "cut", config)))
    assert folder.losses(6) == whole.folder.losses(6)


def test_a_stop_while_pictures_are_drawn_does_not_wait_for_them(tmp_path: Path) -> None:
    run = _run(tmp_path, SHOWN)
    seen = []
    for event in run.events():
        seen.append(event)
        if isinstance(event, ValidationStep):
            run.stop_and_keep()
    assert sum(isinstance(event, ValidationStep) for event in seen) == 1
    assert not any(isinstance(event, Validation) for event in seen)
    assert seen[-1] == Finished(2, run.folder.lora_path(2), trained=True)
    assert run.folder.kept_step(6) == 2


def test_a_stop_while_pictures_of_the_average_are_drawn_keeps_the_runs_own_weights(tmp_path: Path) -> None:
    config = dataclasses.replace(SHOWN, ema_decay=0.9, learning_rate=1e-2)
    whole = _run(tmp_path / "whole", config)
    _read(whole.events())
    run = _run(tmp_path / "cut", config)
    for event in run.events():
        if isinstance(event, ValidationStep):
            run.stop_and_keep()
    assert run.folder.kept_step(6) == 2
    again = _run(tmp_path / "cut", config)
    _read(again.events(resume_stopped=True))
    assert _same_weights(_lora(whole), _lora(again))


def test_what_is_kept_of_a_forced_training_is_the_result_though_the_finished_one_is_there(tmp_path: Path) -> None:
    _read(_run(tmp_path).events())
    stopped = _stop_after(_run(tmp_path), 3, force_retrain=True)
    folder = _run(tmp_path).folder
    assert stopped[-1] == Finished(3, folder.lora_path(3), trained=True)
    assert folder.finished_lora(6) is not None
    assert _read(_run(tmp_path).events()) == [Finished(3, folder.lora_path(3), trained=False)]
    assert _read(_run(tmp_path).events(resume_stopped=True))[-1] == Finished(6, folder.lora_path(6), trained=False)


def test_a_stop_from_another_thread_before_the_first_step_makes_one(tmp_path: Path) -> None:
    run = _run(tmp_path)
    caller = threading.Thread(target=run.stop_and_keep)
    caller.start()
    caller.join()
    events = _read(run.events())
    assert _steps(events) == [1]
    assert events[-1] == Finished(1, run.folder.lora_path(1), trained=True)


def test_another_number_of_steps_is_a_new_wish(tmp_path: Path) -> None:
    _stop_after(_run(tmp_path), 3)
    more = dataclasses.replace(CONFIG, steps=8)
    assert _steps(_read(_run(tmp_path, more).events())) == [4, 5, 6, 7, 8]
    # And it takes nothing from what was kept of the first.
    assert _read(_run(tmp_path).events())[-1].step == 3


def test_a_forced_training_forgets_what_was_kept(tmp_path: Path) -> None:
    _stop_after(_run(tmp_path), 3)
    assert _steps(_read(_run(tmp_path).events(force_retrain=True))) == [1, 2, 3, 4, 5, 6]
    assert _read(_run(tmp_path).events()) == [Finished(6, _run(tmp_path).folder.lora_path(6), trained=False)]


def test_a_kept_adapter_that_is_damaged_comes_from_the_checkpoint(tmp_path: Path) -> None:
    _stop_after(_run(tmp_path), 3)
    path = _run(tmp_path).folder.lora_path(3)
    whole = path.read_bytes()
    path.write_bytes(whole[:-50])
    events = _read(_run(tmp_path).events())
    assert _steps(events) == []
    assert events[-1] == Finished(3, path, trained=True)
    assert path.read_bytes() == whole


def test_going_on_can_be_stopped_and_kept_again(tmp_path: Path) -> None:
    _stop_after(_run(tmp_path), 2)
    events = _stop_after(_run(tmp_path), 4, resume_stopped=True)
    assert _steps(events) == [3, 4]
    assert _read(_run(tmp_path).events())[-1] == Finished(4, _run(tmp_path).folder.lora_path(4), trained=False)


@pytest.mark.parametrize("content", ["", "[]", "{}", '{"step": 9, "steps": 6}', '{"step": "3", "steps": 6}', "\x00"])
def test_a_spoilt_note_of_what_was_kept_is_none(tmp_path: Path, content: str) -> None:
    run = _run(tmp_path)
    run.folder.path.mkdir(parents=True)
    (run.folder.path / "kept.json").write_text(content, encoding="utf-8")
    assert run.folder.kept_step(6) is None
