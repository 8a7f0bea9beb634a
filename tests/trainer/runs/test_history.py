"""A run's log as a chart needs it: bounded, whole at its ends, and whatever is damaged is left out."""

from __future__ import annotations

import json
import time
from pathlib import Path
from typing import Any

import pytest

from subjectbooth.trainer.events import Adjusted, Started, StepDone, to_json
from subjectbooth.trainer.runs.history import read_history


def _write(folder: Path, entries: list[dict[str, Any] | str], steps: int = 10_000) -> Path:
    folder.mkdir(parents=True, exist_ok=True)
    lines = [entry if isinstance(entry, str) else json.dumps(entry) for entry in entries]
    (folder / "events.jsonl").write_text("".join(f"{line}\n" for line in lines), encoding="utf-8")
    (folder / "run.json").write_text(json.dumps({"trigger": "ohwx dog", "config": {"steps": steps}}), encoding="utf-8")
    return folder


def _step(step: int, prior: float | None = 0.1) -> dict[str, Any]:
    losses = {"instance_loss": step / 20} | ({} if prior is None else {"prior_loss": prior})
    return to_json(StepDone(step, 10_000, step / 10, losses, 1e-4, 0.5, 0.25, None))


def test_ten_thousand_steps_become_two_thousand_points(tmp_path: Path) -> None:
    folder = _write(tmp_path, [_step(step) for step in range(1, 10_001)])
    began = time.perf_counter()
    history = read_history(folder)
    print(f"10,000 steps read in {time.perf_counter() - began:.3f} s, {len(json.dumps(history)) / 1024:.0f} KB")
    assert set(history["series"]) == {"loss", "subject", "class"}
    for points in history["series"].values():
        assert len(points) == 2000
        steps = [step for step, _ in points]
        assert steps == sorted(set(steps)) and steps[0] <= 5 and steps[-1] == 10_000
        assert max(after - before for before, after in zip(steps, steps[1:], strict=False)) <= 6, "evenly"
    assert history["series"]["subject"][-1] == [10_000, 500.0]
    assert (history["step"], history["steps"], history["seconds"]) == (10_000, 10_000, 0.25)
    assert history["trigger"] == "ohwx dog"


def test_since_gives_only_what_is_new(tmp_path: Path) -> None:
    folder = _write(tmp_path, [_step(step) for step in range(1, 3001)])
    assert [step for step, _ in read_history(folder, since=2995)["series"]["loss"]] == [2996, 2997, 2998, 2999, 3000]
    assert read_history(folder, since=3000)["series"] == {}
    assert len(read_history(folder, since=10)["series"]["loss"]) == 2000
    assert len(read_history(folder, limit=7)["series"]["loss"]) == 7


def test_what_was_chosen_said_drawn_saved_and_kept(tmp_path: Path) -> None:
    folder = _write(
        tmp_path,
        [
            to_json(Started(0, 8, {"precision": "bf16"}, 5, ("an old note",), "an old plan")),
            _step(1, None),
            to_json(Started(1, 8, {"precision": "fp32"}, 5, ("a note",), "the plan")),
            _step(2, None),
            to_json(Adjusted(2, "less memory", {"precision": "fp32", "pictures_per_forward": "1"})),
            {"event": "Validation", "step": 2, "prompts": ["one", "two"]},
        ],
        steps=8,
    )
    for name in ("lora_000002.safetensors", "lora_000010.safetensors", "lora_x.safetensors", "lora_000003.part"):
        (folder / name).touch()
    (folder / "kept.json").write_text('{"step": 2, "steps": 8}', encoding="utf-8")
    history = read_history(folder)
    assert history["chosen"] == {"precision": "fp32", "pictures_per_forward": "1"}
    assert history["notes"] == ["the plan", "a note", "less memory"]
    assert history["validations"] == [
        {
            "step": 2,
            "prompts": ["one", "two"],
            "pictures": ["validation/step_000002_00.png", "validation/step_000002_01.png"],
        }
    ]
    assert (history["saved"], history["kept"], history["result"]) == ([2, 10], 2, None)
    assert "class" not in history["series"]
    (folder / "kept.json").write_text('{"step": 2, "steps": 9}', encoding="utf-8")
    assert read_history(folder)["kept"] is None, "kept for another number of steps"


@pytest.mark.parametrize("line", [
    "", "null", "[]", "{", '{"event": "StepDone"', '{"event": "StepDone", "step": "x", "loss": 1}', "\x00" * 50,
    '{"event": "StepDone", "step": 2, "loss": "x"}', '{"event": "Validation", "step": null, "prompts": 7}',
    '{"event": "Started", "chosen": [], "notes": 3}', "[" * 5000, '{"event": "StepDone", "step": -1, "loss": 1}',
])  # fmt: skip
def test_a_spoilt_line_costs_only_itself(tmp_path: Path, line: str) -> None:
    history = read_history(_write(tmp_path, [_step(1), line, _step(3)]))
    assert [1, 0.1] in history["series"]["loss"] and [3, 0.3] in [
        [step, round(value, 6)] for step, value in history["series"]["loss"]
    ]
    assert history["validations"] == []


def test_nothing_there_is_an_empty_history(tmp_path: Path) -> None:
    history = read_history(tmp_path / "none")
    assert (history["step"], history["steps"], history["series"], history["result"]) == (0, 0, {}, None)
