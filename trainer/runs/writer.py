"""Writes a run's folder. All writes go through one object, so that additional processes of a run can use a no-op."""

from __future__ import annotations

import dataclasses
import datetime
import io
import json
import time
from collections.abc import Callable, Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from typing import Any, Protocol

import torch
from PIL import Image

from ..events import Event, Validation, to_json
from ..files.lock import lock_folder
from ..files.safetensors_file import Serialized, write_checked
from ..files.storage import disk_errors, remove_temp_files, rename, write_atomic
from ..learn import checkpoint
from ..learn.checkpoint import Checkpoint
from .folder import RunFolder
from .log import to_line, truncate_entries
from .result import KEPT_FILE, RESULT_FILE, Result, ResultFile, published_fields


class RunWriter(Protocol):
    """All write operations of a run.

    Raises:
        SubjectBoothError: from any method, if a file cannot be written.
    """

    def lock(self) -> AbstractContextManager[None]:
        """Lock the folder exclusively; it is created if missing."""
        ...

    def open(self, settings: Mapping[str, Any]) -> float:
        """Write the run's settings; returns the Unix time of the run's first start."""
        ...

    def log(self, event: Event) -> None:
        """Append an event to the log, and save validation images."""
        ...

    def truncate_events(self, step: int, losses: Sequence[Mapping[str, float]] = ()) -> None:
        """Truncate the log to the step from which the run resumes, see :func:`trainer.runs.log.truncate_entries`."""
        ...

    def write_grid(self, picture: Image.Image) -> None:
        """Save the table of validation images."""
        ...

    def save_checkpoint(self, state: Checkpoint) -> None:
        """Replace the last checkpoint."""
        ...

    def set_checkpoint_aside(self, step: int) -> None:
        """Rename the last checkpoint, which a longer run needs to resume, before a shorter run overwrites it.

        Args:
            step: step of the last checkpoint.
        """
        ...

    def save_studied(self, tensors: Mapping[str, torch.Tensor]) -> None:
        """Save what class preservation learned about the base, for a run that resumes."""
        ...

    def write_lora(self, step: int, tensors: Serialized, metadata: dict[str, str]) -> None:
        """Save the adapter of a step."""
        ...

    def write_result(self, result: Result) -> None:
        """Save the result for its number of steps."""
        ...

    def choose_step(self, steps: int, step: int) -> None:
        """Save the step that the user chose as the result of a run of ``steps`` steps; 0 removes it."""
        ...

    def record_published(self, values: Mapping[str, Any]) -> None:
        """Save the front end's record of the published file, plain JSON values."""
        ...

    def revoke_stops(self) -> None:
        """Remove the results of stopped runs, before they are resumed."""
        ...

    def discard_progress(self) -> None:
        """Remove checkpoints and results, but not adapters, before the run is retrained from step 0."""
        ...


MakeWriter = Callable[[RunFolder], RunWriter]


class FolderWriter:
    """Writes the run's folder; files other than the log are replaced atomically.

    Args:
        folder: the run's folder.
    """

    def __init__(self, folder: RunFolder) -> None:
        self._folder = folder

    def lock(self) -> AbstractContextManager[None]:
        """See :func:`trainer.files.lock.lock_folder`."""
        return lock_folder(self._folder.path)

    def open(self, settings: Mapping[str, Any]) -> float:
        """Write ``run.json``, and clean up temporary files. The caller must hold the lock."""
        folder = self._folder
        started = _read_start_time(folder)
        record = {"key": folder.key, "started": started, **settings}
        with disk_errors("the run's folder cannot be written", folder.path):
            for path in (folder.path, folder.path / "validation"):
                remove_temp_files(path)
            write_atomic(folder.record_path, json.dumps(record, indent=1, ensure_ascii=False))
        return started

    def log(self, event: Event) -> None:
        """Append an event to the log; validation images are saved as PNG."""
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
        """Drop the entries of later steps, and add those of missing steps."""
        kept = truncate_entries(self._folder.entries(), step, losses)
        with disk_errors("the run's log cannot be written", self._folder.path):
            write_atomic(self._folder.log_path, "".join(map(to_line, kept)))

    def write_grid(self, picture: Image.Image) -> None:
        """Replace the table of validation images, unless it already is this one."""
        path, content = self._folder.grid_path, io.BytesIO()
        picture.save(content, "PNG")
        with disk_errors("the table of validation images cannot be saved", path.parent):
            if not (path.is_file() and path.read_bytes() == content.getvalue()):
                write_atomic(path, content.getvalue())

    def save_checkpoint(self, state: Checkpoint) -> None:
        """Replace the last checkpoint."""
        with disk_errors("the checkpoint cannot be saved", self._folder.path):
            checkpoint.save(self._folder.checkpoint_path, state)

    def set_checkpoint_aside(self, step: int) -> None:
        """Rename the checkpoint to :meth:`RunFolder.set_aside_path`."""
        with disk_errors("the checkpoint of a longer run cannot be renamed", self._folder.path):
            rename(self._folder.checkpoint_path, self._folder.set_aside_path(step))

    def save_studied(self, tensors: Mapping[str, torch.Tensor]) -> None:
        """Write :attr:`RunFolder.studied_path`."""
        with disk_errors("what was learned about the base cannot be saved", self._folder.path):
            write_checked(self._folder.studied_path, tensors, None)

    def write_lora(self, step: int, tensors: Serialized, metadata: dict[str, str]) -> None:
        """Save the adapter of a step."""
        with disk_errors("the adapter cannot be saved", self._folder.path):
            write_atomic(self._folder.lora_path(step), tensors.parts_with_checksum(metadata))

    def write_result(self, result: Result) -> None:
        """Update ``result.json``, unless it already has this result."""
        found = self._folder.results()
        if not (found.is_current and found.results.get(result.steps) == result):
            self._replace_results(found.with_result(result), f"the result, step {result.step}, cannot be saved")

    def choose_step(self, steps: int, step: int) -> None:
        """Update the user's choices in ``result.json``."""
        self._replace_results(
            self._folder.results().with_choice(steps, step), f"the choice of step {step} is not saved"
        )

    def record_published(self, values: Mapping[str, Any]) -> None:
        """Replace the record of the published file in ``result.json``."""
        replaced = dataclasses.replace(self._folder.results(), published=published_fields(values))
        self._replace_results(replaced, "the run's result cannot be saved")

    def revoke_stops(self) -> None:
        """Remove the results of stopped runs from ``result.json``."""
        found = self._folder.results()
        if any(result.is_stopped for result in found.results.values()):
            self._replace_results(found.without_stops(), "the result of the stopped run cannot be removed")

    def discard_progress(self) -> None:
        """Delete checkpoints and results; the record of the published file is kept."""
        path = self._folder.path
        with disk_errors("the checkpoints of the previous training cannot be removed", path):
            for file in (*path.glob("checkpoint*.safetensors"), self._folder.studied_path):
                file.unlink(missing_ok=True)
        found = self._folder.results()
        if found.results:
            self._replace_results(
                ResultFile({}, found.published), "the result of the previous training cannot be removed"
            )

    def _replace_results(self, content: ResultFile, what: str) -> None:
        path = self._folder.path
        with disk_errors(what, path):
            write_atomic(path / RESULT_FILE, content.to_text())
            (path / KEPT_FILE).unlink(missing_ok=True)  # from an earlier version; result.json replaces it


class SilentWriter:
    """Writes nothing: for additional processes of a run whose folder another process writes.

    Args:
        folder: the run's folder.
    """

    def __init__(self, folder: RunFolder) -> None:
        self._folder = folder

    def lock(self) -> AbstractContextManager[None]:
        """No lock: the writing process holds it."""
        return nullcontext()

    def open(self, settings: Mapping[str, Any]) -> float:
        """The start time that the writing process recorded."""
        return _read_start_time(self._folder)

    def log(self, event: Event) -> None:
        """Do nothing."""

    def truncate_events(self, step: int, losses: Sequence[Mapping[str, float]] = ()) -> None:
        """Do nothing."""

    def write_grid(self, picture: Image.Image) -> None:
        """Do nothing."""

    def save_checkpoint(self, state: Checkpoint) -> None:
        """Do nothing."""

    def set_checkpoint_aside(self, step: int) -> None:
        """Do nothing."""

    def save_studied(self, tensors: Mapping[str, torch.Tensor]) -> None:
        """Do nothing."""

    def write_lora(self, step: int, tensors: Serialized, metadata: dict[str, str]) -> None:
        """Do nothing."""

    def write_result(self, result: Result) -> None:
        """Do nothing."""

    def choose_step(self, steps: int, step: int) -> None:
        """Do nothing."""

    def record_published(self, values: Mapping[str, Any]) -> None:
        """Do nothing."""

    def revoke_stops(self) -> None:
        """Do nothing."""

    def discard_progress(self) -> None:
        """Do nothing."""


def _read_start_time(folder: RunFolder) -> float:
    """The Unix time of the first start from ``run.json``; the current time if there is none."""
    try:
        started = float(int(json.loads(folder.record_path.read_text("utf-8"))["started"]))
        datetime.datetime.fromtimestamp(started, datetime.timezone.utc)
    except (OSError, ValueError, KeyError, TypeError, OverflowError, RecursionError):
        return float(int(time.time()))
    return started
