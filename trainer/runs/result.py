"""Which step of a run is its result, and why: ``result.json`` in the run's folder.

.. code-block:: json

    {"results": {"500": {"step": 320, "why": "stopped"}}, "lora": "rex.safetensors", "size": 3218745}

``results`` has one entry for each number of steps that was asked for, because a longer run with otherwise the same
settings has the same folder. Everything else is what the front end noted about the published file. The choice is no
part of the run's key: choosing another step is writing another entry.

Runs of before ``results`` have ``kept.json`` (``{"step": 320, "steps": 500}``) if they were stopped and kept.
"""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

RESULT_FILE = "result.json"
KEPT_FILE = "kept.json"

LAST = "last"
"""The run did all its steps."""

STOPPED = "stopped"
"""The user stopped the run and kept what it had learned."""


@dataclass(frozen=True)
class Result:
    """The answer to a request for a run of so many steps.

    Attributes:
        step: the optimizer updates behind the adapter that counts.
        steps: how many were asked for.
        why: :data:`LAST`, :data:`STOPPED`, or whatever else chose the step.
    """

    step: int
    steps: int
    why: str

    @property
    def is_stopped(self) -> bool:
        """Whether the run was stopped before its last step, so that it could go on."""
        return self.why == STOPPED


@dataclass(frozen=True)
class ResultFile:
    """The content of ``result.json``.

    Attributes:
        results: by the number of steps that was asked for.
        published: what the front end noted about the published file, as plain JSON values.
        is_damaged: some of it, or all, could not be read.
        is_current: the file itself has the results; not a run of before, and nothing is missing.
    """

    results: Mapping[int, Result] = field(default_factory=dict)
    published: Mapping[str, Any] = field(default_factory=dict)
    is_damaged: bool = False
    is_current: bool = False

    def with_result(self, result: Result) -> ResultFile:
        """The same with another result for that number of steps."""
        return dataclasses.replace(self, results={**self.results, result.steps: result})

    def without_stops(self) -> ResultFile:
        """The same without the results of runs that were stopped."""
        left = {steps: result for steps, result in self.results.items() if not result.is_stopped}
        return dataclasses.replace(self, results=left)

    def to_text(self) -> str:
        """What is written to the file."""
        results = {str(steps): {"step": found.step, "why": found.why} for steps, found in sorted(self.results.items())}
        return json.dumps({"results": results, **self.published}, indent=1, ensure_ascii=False)


def read_results(folder: Path) -> ResultFile:
    """What is known about the results of a run. What is damaged is left out.

    Raises:
        OSError: a file is there and cannot be read.
    """
    content = _read_bytes(folder / RESULT_FILE)
    if content is None:
        return ResultFile(_read_kept_file(folder))
    values = _parse_json(content)
    if values is None:
        return ResultFile(_read_kept_file(folder), is_damaged=True)
    published = {name: value for name, value in values.items() if name != "results"}
    if "results" not in values:
        return ResultFile(_read_kept_file(folder), published)
    entries = values["results"] if isinstance(values["results"], dict) else {}
    results = {found.steps: found for name, entry in entries.items() if (found := _parse_result(name, entry))}
    is_damaged = entries is not values["results"] or len(results) < len(entries)
    return ResultFile(results, published, is_damaged, is_current=not is_damaged)


def _read_kept_file(folder: Path) -> dict[int, Result]:
    """From the file that was written before there was ``results``."""
    values = _parse_json(_read_bytes(folder / KEPT_FILE) or b"") or {}
    found = _checked_result(values.get("step"), values.get("steps"), STOPPED)
    return {found.steps: found} if found is not None and found.step < found.steps else {}


def _parse_result(name: str, entry: Any) -> Result | None:
    steps = int(name) if name.isascii() and name.isdigit() and len(name) < 10 else None
    return _checked_result(entry.get("step"), steps, entry.get("why")) if isinstance(entry, dict) else None


def _checked_result(step: Any, steps: Any, why: Any) -> Result | None:
    whole = all(isinstance(number, int) and not isinstance(number, bool) for number in (step, steps))
    return Result(step, steps, why) if whole and 0 < step <= steps and isinstance(why, str) and why else None


def _read_bytes(path: Path) -> bytes | None:
    try:
        return path.read_bytes()
    except FileNotFoundError:
        return None


def _parse_json(content: bytes) -> dict[str, Any] | None:
    try:
        values = json.loads(content)
    except (ValueError, RecursionError):
        return None
    return values if isinstance(values, dict) else None
