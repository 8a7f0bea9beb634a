"""Lists the runs on the disk, from their folders alone: cheap enough to be read again whenever somebody looks."""

from __future__ import annotations

import math
import os
import re
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ..errors import SubjectBoothError
from ..files.lock import LOCK_NAME, is_locked
from ..files.safetensors_file import read_metadata
from ..files.storage import read_json_object
from ..topics import Topic
from .cleanup import DiskItem, remove_item
from .folder import LORA_FILE, lora_path
from .metadata import base_name
from .result import CHOSEN, LAST, ResultFile, read_results

UNFINISHED = "unfinished"
"""The ``why`` of a run without a result: it was cancelled, or ended by an error, and can be resumed."""

_PICTURE = re.compile(r"step_(\d{6,9})_(\d{2,})\.png")


@dataclass(frozen=True)
class RunSummary:
    """One run, as a list of runs shows it.

    Attributes:
        folder: the run's folder.
        trigger: the trained words.
        step: the step whose adapter is in use: chosen by the user, the run's own result, or the last that was saved.
        steps: planned steps.
        why: why that step, see :mod:`trainer.runs.result`; :data:`UNFINISHED` without a result.
        base: the family of the base, as other tools name it; empty if unknown.
        size: bytes of the folder, all of which deleting the run frees.
        started: Unix time of the first start.
        changed: Unix time of the last change.
        resolution, rank, learning_rate: settings of the run; 0 if unknown.
        preservation: its class preservation, see :data:`trainer.preserve.ways.WAYS`; empty if unknown.
        saved: the steps that have an adapter, in order.
        pictures: number of validation images.
        thumbnail: the first validation image of ``step``, or of the latest step before it; None if there is none.
        published: the front end's record of the published file, see :class:`trainer.runs.result.ResultFile`.
    """

    folder: Path
    trigger: str
    step: int
    steps: int
    why: str
    base: str
    size: int
    started: float
    changed: float
    resolution: int
    rank: int
    learning_rate: float
    preservation: str
    saved: tuple[int, ...]
    pictures: int
    thumbnail: Path | None
    published: dict[str, Any]


def list_runs(root: Path) -> list[RunSummary]:
    """All runs, the latest change first. Folders that are not runs, and links, are ignored; damaged files are skipped.

    Neither logs nor checkpoints nor images are opened: 200 runs take about a quarter of a second.

    Args:
        root: the folder that contains all runs.
    """
    try:
        folders = [Path(entry.path) for entry in os.scandir(root) if entry.is_dir(follow_symlinks=False)]
    except OSError:  # nothing was trained yet
        return []
    found = [summary for folder in folders if (summary := summarise(folder)) is not None]
    return sorted(found, key=lambda summary: (-summary.changed, summary.folder.name))


def summarise(folder: Path) -> RunSummary | None:
    """Summarise a run; None if the folder is not a run's."""
    record = read_json_object(folder / "run.json")
    key = record.get("key")
    if not (isinstance(key, str) and re.fullmatch("[0-9a-f]{64}", key) and folder.name.endswith(f"_{key[:12]}")):
        return None
    size, changed, saved, pictures = _walk(folder)
    config = record.get("config")
    config = config if isinstance(config, dict) else {}
    steps = _whole(config.get("steps"))
    step, why, published = _step_in_use(folder, steps, saved)
    before = [number for number in sorted(pictures) if number <= step] if step else sorted(pictures)
    return RunSummary(
        folder=folder,
        trigger=str(record.get("trigger", "")),
        step=step,
        steps=steps,
        why=why,
        base=str(record.get("base") or _base_of(folder, saved)),
        size=size,
        started=_number(record.get("started")),
        changed=changed,
        resolution=_whole(config.get("resolution")),
        rank=_whole(config.get("rank")),
        learning_rate=_number(config.get("learning_rate")),
        preservation=str(record.get("preservation") or ""),
        saved=tuple(saved),
        pictures=sum(map(len, pictures.values())),
        thumbnail=pictures[before[-1]][0] if before else None,
        published=published,
    )


def delete_run(folder: Path) -> int:
    """Delete a run with its checkpoints, adapters, images and log. Published LoRAs and class images are elsewhere.

    Returns:
        The bytes freed.

    Raises:
        SubjectBoothError: the folder is not a run's, a program is using it, or a file cannot be deleted.
    """
    summary = summarise(folder)
    if summary is None or folder.is_symlink():
        raise SubjectBoothError(f"{folder.name} is not a run", "the folder of a run", "choose a run from the list")
    if is_locked(folder):
        raise SubjectBoothError(
            f"the run {folder.name} is in training",
            "a run that no program is using",
            "wait until it has finished, or stop it",
            str(folder),
            Topic.RUN_IN_PROGRESS,
        )
    try:
        return remove_item(DiskItem(folder, "run", summary.size, summary.changed))
    except OSError as error:
        raise SubjectBoothError(
            f"{folder.name} could not be deleted completely ({error.strerror or type(error).__name__})",
            "write access to its files",
            "close the programs that have them open, and try again",
            str(folder),
        ) from error


def _step_in_use(folder: Path, steps: int, saved: list[int]) -> tuple[int, str, dict[str, Any]]:
    try:
        results = read_results(folder)
    except OSError:
        results = ResultFile()
    own, chosen, published = results.results.get(steps), results.chosen.get(steps), dict(results.published)
    if chosen:
        return chosen, CHOSEN, published
    if own is not None:
        return own.step, own.why, published
    # Unfinished, or of an earlier version that wrote no results.
    last = saved[-1] if saved else 0
    return last, LAST if last and last == steps else UNFINISHED, published


def _walk(folder: Path) -> tuple[int, float, list[int], dict[int, list[Path]]]:
    """Bytes, time of the last change, steps with an adapter, and validation images by step, in one pass."""
    size, changed = 0, 0.0
    saved: list[int] = []
    pictures: dict[int, list[Path]] = {}
    # Compared as text: building 20,000 paths would take longer than reading the folders.
    own, validation = len(str(folder)) + 1, f"{folder / 'validation'}{os.sep}"
    for entry in _files(folder):
        try:
            status = entry.stat(follow_symlinks=False)
        except OSError:  # deleted meanwhile
            continue
        size += status.st_size
        if entry.name != LOCK_NAME:  # which looking at the lock touches
            changed = max(changed, status.st_mtime)
        if found := LORA_FILE.fullmatch(entry.path[own:]):
            saved.append(int(found[1]))
        elif entry.path.startswith(validation) and (found := _PICTURE.fullmatch(entry.path[len(validation) :])):
            pictures.setdefault(int(found[1]), []).append(Path(entry.path))
    for images in pictures.values():
        images.sort()
    return size, changed, sorted(saved), pictures


def _files(folder: Path | str) -> Iterator[os.DirEntry[str]]:
    """All files below a folder that are not links."""
    try:
        entries = list(os.scandir(folder))
    except OSError:
        return
    for entry in entries:
        if entry.is_dir(follow_symlinks=False):
            yield from _files(entry.path)
        elif entry.is_file(follow_symlinks=False):
            yield entry


def _base_of(folder: Path, saved: list[int]) -> str:
    """The base's family, for runs of versions that did not record it."""
    try:
        return base_name(read_metadata(lora_path(folder, saved[-1]))) if saved else ""
    except (SubjectBoothError, OSError):
        return ""


def _number(value: Any) -> float:
    return float(value) if isinstance(value, (int, float)) and math.isfinite(value) else 0.0


def _whole(value: Any) -> int:
    return value if isinstance(value, int) and not isinstance(value, bool) and value > 0 else 0
