"""``result.json`` in the run's folder: which step is the result of the run, and why.

.. code-block:: json

    {"results": {"500": {"step": 320, "why": "stopped"}}, "chosen": {"500": 200}, "lora": "rex.safetensors"}

``results`` has one entry per requested number of steps, because runs that differ only in their steps share a folder.
``chosen`` has the steps that the user uses instead; without its entry, the run's own result counts again.
All other fields are the front end's record of the published file. The result is not part of the run's key, so another
step can be chosen by writing another entry.

Earlier versions wrote ``kept.json`` (``{"step": 320, "steps": 500}``) for runs that were stopped and kept.
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
"""The run completed all its steps."""

BEST = "best"
"""The run completed all its steps, and this one has the best scores."""

STOPPED = "stopped"
"""The user stopped the run and kept its adapter."""

CHOSEN = "chosen"
"""The user chose this step in place of the run's own result."""


@dataclass(frozen=True)
class Result:
    """The result of a run with a given number of steps.

    Attributes:
        step: the step whose adapter is the result.
        steps: the requested number of steps.
        why: the reason for the choice: :data:`LAST`, :data:`BEST`, :data:`STOPPED`, :data:`CHOSEN`, or any other.
    """

    step: int
    steps: int
    why: str

    @property
    def is_stopped(self) -> bool:
        """Whether the run was stopped before its last step and can be resumed."""
        return self.why == STOPPED


@dataclass(frozen=True)
class ResultFile:
    """The content of ``result.json``.

    Attributes:
        results: the run's own results, by requested number of steps.
        published: the front end's record of the published file, as plain JSON values.
        chosen: the steps that the user chose instead, by requested number of steps.
        is_damaged: whether some or all of the content is invalid.
        is_current: whether all results are from ``result.json`` itself, in the current format.
    """

    results: Mapping[int, Result] = field(default_factory=dict)
    published: Mapping[str, Any] = field(default_factory=dict)
    chosen: Mapping[int, int] = field(default_factory=dict)
    is_damaged: bool = False
    is_current: bool = False

    def with_result(self, result: Result) -> ResultFile:
        """A copy with this result for its number of steps."""
        return dataclasses.replace(self, results={**self.results, result.steps: result})

    def with_choice(self, steps: int, step: int) -> ResultFile:
        """A copy with the user's choice for a number of steps; 0 removes it."""
        others = {other: chosen for other, chosen in self.chosen.items() if other != steps}
        return dataclasses.replace(self, chosen={**others, steps: step} if step else others)

    def without_stops(self) -> ResultFile:
        """A copy without the results of stopped runs."""
        left = {steps: result for steps, result in self.results.items() if not result.is_stopped}
        return dataclasses.replace(self, results=left)

    def to_text(self) -> str:
        """The content as JSON text."""
        results = {str(steps): {"step": found.step, "why": found.why} for steps, found in sorted(self.results.items())}
        chosen = {"chosen": {str(steps): step for steps, step in sorted(self.chosen.items())}} if self.chosen else {}
        return json.dumps({"results": results, **chosen, **self.published}, indent=1, ensure_ascii=False)


def read_results(folder: Path) -> ResultFile:
    """Read the results of a run. Invalid entries are skipped.

    Raises:
        OSError: a file exists but cannot be read.
    """
    content = _read_bytes(folder / RESULT_FILE)
    if content is None:
        return ResultFile(_read_kept_file(folder))
    values = _parse_json(content)
    if values is None:
        return ResultFile(_read_kept_file(folder), is_damaged=True)
    published = published_fields(values)
    if "results" not in values:
        return ResultFile(_read_kept_file(folder), published)
    entries = values["results"] if isinstance(values["results"], dict) else {}
    results = {found.steps: found for name, entry in entries.items() if (found := _parse_result(name, entry))}
    is_damaged = entries is not values["results"] or len(results) < len(entries)
    chosen = values.get("chosen")
    entries = {name: {"step": step, "why": CHOSEN} for name, step in chosen.items()} if isinstance(chosen, dict) else {}
    choices = [found for name, entry in entries.items() if (found := _parse_result(name, entry))]
    return ResultFile(
        results, published, {found.steps: found.step for found in choices}, is_damaged, is_current=not is_damaged
    )


def published_fields(values: Mapping[str, Any]) -> dict[str, Any]:
    """The fields that are the front end's own, see :attr:`ResultFile.published`."""
    return {name: value for name, value in values.items() if name not in ("results", "chosen")}


def _read_kept_file(folder: Path) -> dict[int, Result]:
    """The result from ``kept.json``, which earlier versions wrote."""
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
