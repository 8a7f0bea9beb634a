"""A second process of a run writes nothing and learns the same; an evaluator's scores are logged with the rest."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path

import pytest

from subjectbooth.tests.small_base import folder_bytes, small_base, small_subject
from subjectbooth.tests.trainer.runs.test_run import CPU
from subjectbooth.trainer.config import TrainConfig
from subjectbooth.trainer.events import Event, Finished, Scores, Started, StepDone, Validation
from subjectbooth.trainer.runs.history import read_history
from subjectbooth.trainer.runs.recipe import Recipe
from subjectbooth.trainer.runs.result import STOPPED, Result
from subjectbooth.trainer.runs.writer import SilentWriter
from subjectbooth.trainer.shell import trackers
from subjectbooth.trainer.shell.trackers import Tracker

CONFIG = TrainConfig(
    steps=3,
    learning_rate=1e-3,
    rank=2,
    network_alpha=2.0,
    resolution=64,
    validation_prompts=("a photo of {subject}",),
    validation_interval=2,
    validation_steps=1,
    checkpoint_seconds=0.0,
)
RECIPE = Recipe(small_base(), small_subject(), CONFIG)


def _losses(events: list[Event]) -> list[tuple[int, float]]:
    return [(event.step, event.loss) for event in events if isinstance(event, StepDone)]


def test_a_writer_that_writes_nothing_leaves_the_folder_untouched_and_learns_the_same(tmp_path: Path) -> None:
    silent = RECIPE.run(tmp_path / "silent", CPU, make_writer=SilentWriter)
    seen = list(silent.events())
    assert not (tmp_path / "silent").exists()
    assert isinstance(seen[-1], Finished) and (seen[-1].step, seen[-1].trained, seen[-1].warning) == (3, True, "")

    run = RECIPE.run(tmp_path, CPU)
    whole = list(run.events())
    assert _losses(seen) == _losses(whole) and len(_losses(whole)) == 3
    files = {path.name for path in run.folder.path.iterdir()}
    assert {"run.json", "events.jsonl", "checkpoint.safetensors", "lora_000003.safetensors", "validation"} <= files
    assert json.loads((run.folder.path / "result.json").read_text("utf-8")) == {
        "results": {"3": {"step": 3, "why": "last"}}
    }

    # Nor does it touch a folder that is there, whether it begins again, goes on, is stopped or is cancelled.
    longer = RECIPE.vary(steps=5)
    run.writer.write_result(Result(3, 5, STOPPED))
    before = folder_bytes(tmp_path)
    again = list(RECIPE.run(tmp_path, CPU, make_writer=SilentWriter).events(force_retrain=True))
    assert _losses(again) == _losses(whole)
    resumed = list(longer.run(tmp_path, CPU, make_writer=SilentWriter).events(resume_stopped=True))
    assert [step for step, _ in _losses(resumed)] == [4, 5]
    stopped = longer.run(tmp_path, CPU, make_writer=SilentWriter)
    stopped.stop_and_keep()
    assert list(stopped.events(resume_stopped=True))[-1].step == 3 and stopped.result == Result(3, 5, STOPPED)
    cancelled = longer.run(tmp_path, CPU, make_writer=SilentWriter).events(resume_stopped=True)
    next(event for event in cancelled if isinstance(event, StepDone))
    cancelled.close()
    shorter = RECIPE.vary(steps=2).run(tmp_path, CPU, make_writer=SilentWriter)
    assert shorter.folder.load_checkpoint(2, shorter.writer.set_checkpoint_aside) is None
    shorter.writer.record_published({"lora": "x"})
    assert folder_bytes(tmp_path) == before


class Brightness:
    """Scores the validation pictures, and nothing else."""

    def __init__(self) -> None:
        self.asked: list[Event] = []

    def scores(self, event: Event) -> Mapping[str, float]:
        self.asked.append(event)
        return {"brightness": float(event.images.mean())} if isinstance(event, Validation) else {}


def test_an_evaluators_scores_are_logged_and_yielded_and_change_nothing(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    evaluator, shown = Brightness(), Shown()
    monkeypatch.setitem(trackers.BACKENDS, "json", lambda folder, settings, step: shown)
    run = RECIPE.run(tmp_path / "judged", CPU, evaluator=evaluator)
    tracker = Tracker("json", run.folder, CONFIG, lambda sentence: pytest.fail(sentence))
    seen = []
    for event in run.events():
        seen.append(event)
        tracker.follow(event)
    scores = [event for event in seen if isinstance(event, Scores) and "brightness" in event.values]
    pictures = [event for event in seen if isinstance(event, Validation)]
    assert [(event.step, event.values) for event in scores] == [
        (event.step, {"brightness": float(event.images.mean())}) for event in pictures
    ]
    assert [event.step for event in scores] == [2, 3]
    assert all(seen[seen.index(event) - 1] in pictures for event in scores), "right after what they are about"
    assert [event for event in seen if not isinstance(event, (Scores, Finished))] == evaluator.asked
    assert isinstance(evaluator.asked[0], Started) and isinstance(seen[-1], Finished)
    logged = [entry for entry in run.folder.entries() if "brightness" in entry.get("values", ())]
    assert logged == [{"event": "Scores", "step": event.step, "values": dict(event.values)} for event in scores]
    assert {("scores/brightness", event.step) for event in scores} <= set(shown.scalars_seen)

    plain = RECIPE.run(tmp_path / "plain", CPU)
    assert _losses(list(plain.events())) == _losses(seen)
    assert plain.folder.key == run.folder.key
    with_scores, without = read_history(run.folder.path), read_history(plain.folder.path)
    of_the_machine = {"seconds": None, "notes": None}
    assert {**with_scores, **of_the_machine} == {**without, **of_the_machine}, "a chart knows nothing of them"


def test_scores_of_steps_that_are_trained_again_go_from_the_log(tmp_path: Path) -> None:
    first = RECIPE.run(tmp_path, CPU, evaluator=Brightness()).events()
    next(event for event in first if isinstance(event, Scores) and "brightness" in event.values)
    first.close()
    run = RECIPE.run(tmp_path, CPU, evaluator=Brightness())
    list(run.events())
    assert [entry["step"] for entry in run.folder.entries() if "brightness" in entry.get("values", ())] == [2, 3]


class Shown:
    def __init__(self) -> None:
        self.scalars_seen: list[tuple[str, int]] = []

    def log_scalars(self, values: dict[str, float], step: int) -> None:
        self.scalars_seen += [(name, step) for name in values]

    def log_images(self, event: Validation) -> None:
        pass

    def close(self) -> None:
        pass
