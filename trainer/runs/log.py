"""A run's log: one JSON line per event. Damaged lines, such as after a kill or a power cut, are skipped."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from ..events import Scores, StepDone

Entry = dict[str, Any]


def read_entries(log: Path) -> list[Entry]:
    """All valid entries; each has an ``event`` (its type) and a ``step``. Empty if there is no log.

    Raises:
        OSError: the log exists but cannot be read.
    """
    if not log.is_file():
        return []
    entries = []
    for line in log.read_text("utf-8", errors="replace").split("\n"):
        try:
            entry = json.loads(line)
            if isinstance(entry["step"], int) and isinstance(entry["event"], str):
                entries.append(entry)
        except (ValueError, KeyError, TypeError, RecursionError):
            continue
    return entries


def truncate_entries(entries: Sequence[Entry], step: int, losses: Sequence[Mapping[str, float]]) -> list[Entry]:
    """Drop the entries after a step, and add entries for steps that are missing.

    Lines are appended without flushing them to disk, so a power cut may lose some.

    Args:
        entries: the log.
        step: the last step to keep.
        losses: for each step, the total ("loss") and its terms by name.
    """
    kept = [entry for entry in entries if entry["step"] <= step and step > 0]
    logged = {entry["step"] for entry in kept if entry["event"] == StepDone.__name__}
    for number, values in enumerate(losses[:step], start=1):
        if number not in logged:
            kept.append({"event": StepDone.__name__, "step": number, **values})
    if len(logged) < step:
        kept.sort(key=lambda entry: entry["step"])
    return kept


def scores_of(entries: Sequence[Entry], steps: int) -> dict[int, dict[str, float]]:
    """The logged scores up to ``steps``, by step and name; step 0 is the base."""
    found: dict[int, dict[str, float]] = {}
    for entry in entries:
        step, values = entry.get("step"), entry.get("values")
        if entry.get("event") != Scores.__name__ or not isinstance(values, dict):
            continue
        if isinstance(step, int) and 0 <= step <= steps:
            numbers = {name: value for name, value in values.items() if isinstance(value, (int, float))}
            found.setdefault(step, {}).update(numbers)
    return found


def to_line(entry: Entry) -> str:
    """Format an entry as one line of the log."""
    return json.dumps(entry, ensure_ascii=False) + "\n"
