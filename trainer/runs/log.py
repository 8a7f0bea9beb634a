"""A run's log: one JSON line for each event. Lines that a kill or the disk has damaged are left out."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from ..events import StepDone

Entry = dict[str, Any]


def read_entries(log: Path) -> list[Entry]:
    """All whole entries: each has an ``event`` (its kind) and a ``step``. None if there is no log.

    Raises:
        OSError: it is there and cannot be read.
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
    """The entries up to a step, with those of steps that are missing.

    Args:
        entries: the log.
        step: the last one to keep.
        losses: of each step, the whole ("loss") and its terms by name. The log is appended to without a flush to the
            disk, so a power cut can cost some of its lines.
    """
    kept = [entry for entry in entries if entry["step"] <= step and step > 0]
    there = {entry["step"] for entry in kept if entry["event"] == StepDone.__name__}
    for number, values in enumerate(losses[:step], start=1):
        if number not in there:
            kept.append({"event": StepDone.__name__, "step": number, **values})
    if len(there) < step:
        kept.sort(key=lambda entry: entry["step"])
    return kept


def to_line(entry: Entry) -> str:
    """The entry as one line of the log."""
    return json.dumps(entry, ensure_ascii=False) + "\n"
