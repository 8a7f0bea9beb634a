"""Everything that a run writes goes through one object, so that a second process of the same run can write nothing."""

from __future__ import annotations

import datetime
import json
import time
from collections.abc import Callable, Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from typing import Any, Protocol

import torch
from PIL import Image

from ..events import Event, Validation, to_json
from ..files.lock import lock_folder
from ..files.safetensors_file import to_bytes_with_checksum
from ..files.storage import disk_errors, remove_temp_files, rename, write_atomic
from ..learn import checkpoint
from ..learn.checkpoint import Checkpoint
from .folder import RunFolder
from .log import to_line, truncate_entries
from .result import KEPT_FILE, RESULT_FILE, Result, ResultFile


class RunWriter(Protocol):
    """What a run writes.

    Raises:
        SubjectBoothError: any method, if the disk refuses.
    """

    def lock(self) -> AbstractContextManager[None]:
        """Be the only one at work in the folder, which is made if it is missing."""
        ...

    def open(self, settings: Mapping[str, Any]) -> float:
        """Record what the run is made of; returns the Unix time at which the run was first opened."""
        ...

    def log(self, event: Event) -> None:
        """Append the event; validation pictures become files."""
        ...

    def truncate_events(self, step: int, losses: Sequence[Mapping[str, float]] = ()) -> None:
        """Cut the log down to the step that the run goes on from, see :func:`trainer.runs.log.truncate_entries`."""
        ...

    def save_checkpoint(self, state: Checkpoint) -> None:
        """Replace the last checkpoint."""
        ...

    def set_checkpoint_aside(self, step: int) -> None:
        """Keep the last checkpoint, of that step, out of the way of a shorter run: a longer one goes on from it."""
        ...

    def write_lora(self, step: int, tensors: dict[str, torch.Tensor], metadata: dict[str, str]) -> None:
        """Write the adapter of that step."""
        ...

    def write_result(self, result: Result) -> None:
        """Make a step the result of the run of that many steps."""
        ...

    def record_published(self, values: Mapping[str, Any]) -> None:
        """Note what the front end published, as plain JSON values, for whoever looks at it later."""
        ...

    def revoke_stops(self) -> None:
        """Before a run goes on that was stopped and kept."""
        ...

    def discard_progress(self) -> None:
        """Before a forced second training: the state of the first is in the way, its adapters are not."""
        ...


MakeWriter = Callable[[RunFolder], RunWriter]


class FolderWriter:
    """Writes the run's folder, each file in one step.

    Args:
        folder: the run's.
    """

    def __init__(self, folder: RunFolder) -> None:
        self._folder = folder

    def lock(self) -> AbstractContextManager[None]:
        """See :func:`trainer.files.lock.lock_folder`."""
        return lock_folder(self._folder.path)

    def open(self, settings: Mapping[str, Any]) -> float:
        """Make the folder, or find it again. Only for who holds the lock."""
        folder = self._folder
        started = _read_start_time(folder)
        record = {"key": folder.key, "started": started, **settings}
        with disk_errors("the run's folder cannot be written", folder.path):
            for path in (folder.path, folder.path / "validation"):
                remove_temp_files(path)
            write_atomic(folder.record_path, json.dumps(record, indent=1, ensure_ascii=False))
        return started

    def log(self, event: Event) -> None:
        """Append the event; validation pictures are written as PNG."""
        folder = self._folder
        with disk_errors("the run's log cannot be written", folder.path):
            if isinstance(event, Validation):
                for path, image in zip(
                    folder.validation_paths(event.step, len(event.prompts)), event.images, strict=True
                ):
                    picture = Image.fromarray((image.clamp(0, 1) * 255).round().to(torch.uint8).numpy())
                    write_atomic(path, picture.save)
            with folder.log_path.open("a", encoding="utf-8") as file:
                file.write(to_line(to_json(event)))

    def truncate_events(self, step: int, losses: Sequence[Mapping[str, float]] = ()) -> None:
        """Drop the lines of later steps, and write those that are missing."""
        kept = truncate_entries(self._folder.entries(), step, losses)
        with disk_errors("the run's log cannot be written", self._folder.path):
            write_atomic(self._folder.log_path, "".join(map(to_line, kept)))

    def save_checkpoint(self, state: Checkpoint) -> None:
        """Replace the last checkpoint."""
        with disk_errors("the checkpoint cannot be saved", self._folder.path):
            checkpoint.save(self._folder.checkpoint_path, state)

    def set_checkpoint_aside(self, step: int) -> None:
        """Rename it."""
        with disk_errors("the checkpoint of a longer run cannot be put aside", self._folder.path):
            rename(self._folder.checkpoint_path, self._folder.set_aside_path(step))

    def write_lora(self, step: int, tensors: dict[str, torch.Tensor], metadata: dict[str, str]) -> None:
        """Write the adapter of that step."""
        with disk_errors("the adapter cannot be saved", self._folder.path):
            write_atomic(self._folder.lora_path(step), to_bytes_with_checksum(tensors, metadata))

    def write_result(self, result: Result) -> None:
        """Write the file, unless it says so already."""
        found = self._folder.results()
        if not (found.is_current and found.results.get(result.steps) == result):
            self._replace_results(found.with_result(result), f"the result, step {result.step}, cannot be saved")

    def record_published(self, values: Mapping[str, Any]) -> None:
        """Write the file with other values for what was published."""
        found = self._folder.results()
        replaced = ResultFile(found.results, {name: value for name, value in values.items() if name != "results"})
        self._replace_results(replaced, "the run's result cannot be noted")

    def revoke_stops(self) -> None:
        """Write the file without the results of runs that were stopped, if there are any."""
        found = self._folder.results()
        if any(result.is_stopped for result in found.results.values()):
            self._replace_results(found.without_stops(), "the mark of the stop cannot be removed")

    def discard_progress(self) -> None:
        """Remove the checkpoints and the results; what was published stays noted."""
        path = self._folder.path
        with disk_errors("what is left of the training before cannot be removed", path):
            for file in path.glob("checkpoint*.safetensors"):
                file.unlink()
        found = self._folder.results()
        if found.results:
            self._replace_results(ResultFile({}, found.published), "the result of before cannot be removed")

    def _replace_results(self, content: ResultFile, what: str) -> None:
        path = self._folder.path
        with disk_errors(what, path):
            write_atomic(path / RESULT_FILE, content.to_text())
            (path / KEPT_FILE).unlink(missing_ok=True)  # read until here, if a version of before wrote it


class SilentWriter:
    """Writes nothing: for another process of a run that one process writes already.

    Args:
        folder: the run's.
    """

    def __init__(self, folder: RunFolder) -> None:
        self._folder = folder

    def lock(self) -> AbstractContextManager[None]:
        """The one that writes has the lock."""
        return nullcontext()

    def open(self, settings: Mapping[str, Any]) -> float:
        """As the one that writes has recorded it."""
        return _read_start_time(self._folder)

    def log(self, event: Event) -> None:
        """Nothing."""

    def truncate_events(self, step: int, losses: Sequence[Mapping[str, float]] = ()) -> None:
        """Nothing."""

    def save_checkpoint(self, state: Checkpoint) -> None:
        """Nothing."""

    def set_checkpoint_aside(self, step: int) -> None:
        """Nothing."""

    def write_lora(self, step: int, tensors: dict[str, torch.Tensor], metadata: dict[str, str]) -> None:
        """Nothing."""

    def write_result(self, result: Result) -> None:
        """Nothing."""

    def record_published(self, values: Mapping[str, Any]) -> None:
        """Nothing."""

    def revoke_stops(self) -> None:
        """Nothing."""

    def discard_progress(self) -> None:
        """Nothing."""


def _read_start_time(folder: RunFolder) -> float:
    """The Unix time in the run's record; now if there is none."""
    try:
        started = float(int(json.loads(folder.record_path.read_text("utf-8"))["started"]))
        datetime.datetime.fromtimestamp(started, datetime.timezone.utc)
    except (OSError, ValueError, KeyError, TypeError, OverflowError, RecursionError):
        return float(int(time.time()))
    return started
