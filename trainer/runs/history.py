"""Summarises a run's folder for a chart: a bounded number of points for any length of run, and the run's state."""

from __future__ import annotations

import json
import re
from bisect import bisect_right
from pathlib import Path
from typing import Any

from ..events import Adjusted, Started, Validation
from ..files.storage import read_json_object
from ..preserve.ways import loss_labels
from .best_step import share_curves
from .folder import saved_steps
from .log import scores_of
from .result import ResultFile, read_results

LIMIT = 2000
"""Maximum points per curve: more than a chart has pixels."""

RECENT = 20
"""Number of steps over which the time per step is averaged, as for the remaining time (see trainer.learn.loop)."""

_STEP_LINE = re.compile(rb'\{"event": "StepDone", "step": (\d{1,15}),')


def curve_points(values: dict[str, Any]) -> dict[str, float]:
    """The value of each curve at one step, from the step's log entry."""
    labels = {"loss": "loss", **loss_labels()}
    return {label: values[field] for field, label in labels.items() if isinstance(values.get(field), (int, float))}


def read_history(folder: Path, since: int = 0, limit: int = LIMIT) -> dict[str, Any]:
    """Read the history of a run, as plain JSON values. Damaged data is skipped.

    Args:
        folder: the run's folder.
        since: return only points of later steps.
        limit: maximum points per curve, sampled evenly; the last point is always included.

    Returns:
        ``step``, ``steps`` and ``trigger``; ``seconds`` per step (None before the first); ``series``, by name,
        ``[[step, value], ...]``; ``scores``, see :func:`trainer.runs.best_step.share_curves`; ``chosen`` and ``notes``
        since the last start; ``validations`` with ``step``, ``prompts`` and ``pictures`` (file names relative to the
        folder); ``saved``, the steps that have an adapter; ``kept``, the step at which the run was stopped and kept;
        ``result``, the record of the published file.
    """
    lines, others = _split_log(folder / "events.jsonl")
    record = read_json_object(folder / "run.json")
    steps = _positive_int((record.get("config") or {}).get("steps")) if isinstance(record.get("config"), dict) else 0
    try:
        results = read_results(folder)
    except OSError:
        results = ResultFile()
    result = results.results.get(steps)
    later = lines[bisect_right(lines, since, key=_step_of) :]
    chosen, notes, validations = _read_notes_and_validations(others)
    last = _parse_json(lines[-1]) if lines else {}
    recent = [
        values["seconds"]
        for values in map(_parse_json, lines[-RECENT:])
        if isinstance(values.get("seconds"), (int, float))
    ]
    done = max([_positive_int(last.get("step")), *(_positive_int(values.get("step")) for values in others)])
    return {
        "step": done,
        "steps": steps,
        "trigger": str(record.get("trigger", "")),
        "seconds": sum(recent) / len(recent) if recent else None,
        "series": _build_series([_parse_json(line) for line in _sample_evenly(later, limit)]),
        "scores": share_curves(scores_of(others, steps or done)),
        "chosen": chosen,
        "notes": notes,
        "validations": [validation for validation in validations if _positive_int(validation["step"]) > 0],
        "saved": saved_steps(folder),
        "kept": result.step if result is not None and result.is_stopped else None,
        "result": dict(results.published) or None,
    }


def _split_log(log: Path) -> tuple[list[bytes], list[dict[str, Any]]]:
    """The unparsed lines of steps, and all other entries. Parsing 10,000 lines of JSON would take 0.1 s."""
    try:
        content = log.read_bytes()
    except OSError:
        return [], []
    lines, others = [], []
    for line in content.split(b"\n"):
        if _STEP_LINE.match(line):
            lines.append(line)
        elif values := _parse_json(line):
            others.append(values)
    return lines, others


def _read_notes_and_validations(
    entries: list[dict[str, Any]],
) -> tuple[dict[str, Any], list[str], list[dict[str, Any]]]:
    """Chosen settings and notes since the last start, and all validations. A resumed run has several starts."""
    chosen: dict[str, Any] = {}
    notes: list[str] = []
    validations: dict[int, dict[str, Any]] = {}
    for values in entries:
        if values.get("event") in (Started.__name__, Adjusted.__name__):
            found = values.get("chosen")
            chosen = found if isinstance(found, dict) and found else chosen
            logged = values.get("notes")
            found = [values.get("plan"), *logged] if isinstance(logged, list) else [values.get("note")]
            new = [str(note) for note in found if note]
            # A start replaces the notes of earlier starts; an adjustment adds to them.
            notes = new if values["event"] == Started.__name__ else [*notes, *new]
        elif values.get("event") == Validation.__name__:
            step, prompts = _positive_int(values.get("step")), values.get("prompts")
            prompts = [str(prompt) for prompt in prompts] if isinstance(prompts, list) else []
            pictures = [f"validation/step_{step:06d}_{number:02d}.png" for number in range(len(prompts))]
            validations[step] = {"step": step, "prompts": prompts, "pictures": pictures}
    return chosen, notes, [validations[step] for step in sorted(validations)]


def _build_series(entries: list[dict[str, Any]]) -> dict[str, list[list[float]]]:
    series: dict[str, list[list[float]]] = {}
    for values in entries:
        if step := _positive_int(values.get("step")):
            for name, value in curve_points(values).items():
                series.setdefault(name, []).append([step, value])
    return series


def _sample_evenly(lines: list[bytes], limit: int) -> list[bytes]:
    if len(lines) <= limit:
        return lines
    return [lines[(number + 1) * len(lines) // limit - 1] for number in range(limit)]


def _step_of(line: bytes) -> int:
    found = _STEP_LINE.match(line)
    return int(found[1]) if found else 0


def _positive_int(value: Any) -> int:
    return value if isinstance(value, int) and not isinstance(value, bool) and value > 0 else 0


def _parse_json(line: bytes) -> dict[str, Any]:
    try:
        values = json.loads(line)
    except (ValueError, RecursionError):
        return {}
    return values if isinstance(values, dict) else {}
