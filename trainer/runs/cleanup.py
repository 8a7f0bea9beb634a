"""Limits disk usage: measures runs and class images, and finds those that no LoRA needs.

Nothing is deleted automatically: :func:`survey` lists the folders, :func:`choose_removable` selects, and
:func:`remove_items` deletes.
"""

from __future__ import annotations

import contextlib
import json
import logging
import os
import re
import shutil
import time
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

from ..errors import SubjectBoothError
from ..files.lock import LOCK_NAME, is_locked, lock_folder
from ..files.safetensors_file import read_metadata
from ..files.storage import read_json_object, write_atomic
from .folder import lora_path, saved_steps
from .result import read_results

logger = logging.getLogger("subjectbooth")

DEFAULT_LIMIT = 20 * 10**9
"""Total bytes of runs and class images above which the user is warned. A run of SD 1.5 at rank 16 takes about 60 MB
with its checkpoint, and 13 MB more for each step whose LoRA it keeps (SDXL: 93 MB; at most 32, see
:attr:`trainer.config.TrainConfig.kept_interval`)."""
LIMIT_VARIABLE = "SUBJECTBOOTH_DISK_LIMIT"
LORA_FOLDERS = "lora_folders.json"
"""File in the pack's output folder that lists ComfyUI's LoRA folders. extra_model_paths.yaml may add any folder, and a
run whose LoRA is in an unknown folder would look unused."""
RECENT = 3600
"""Seconds after a change during which a folder counts as in use: class images have no lock, and a graph generates them
before the run starts."""

_UNITS = {"T": 10**12, "G": 10**9, "M": 10**6, "K": 10**3, "": 1}


@dataclass(frozen=True)
class DiskItem:
    """The folder of a run or of a set of class images, or the LoRAs of a run's other steps than its result.

    Attributes:
        path: the folder.
        kind: ``run``, ``other steps`` or ``class images``.
        size: bytes.
        changed: Unix time of the last change to a file in the folder.
        keep_reason: why it must stay; empty if it may be removed.
        files: what is removed of the folder; empty for all of it.
    """

    path: Path
    kind: str
    size: int
    changed: float
    keep_reason: str = ""
    files: tuple[Path, ...] = ()


def parse_size(text: str) -> int:
    """Parse ``"5GB"``, ``"500 MB"`` or a number of bytes.

    Raises:
        SubjectBoothError: the text is not a size.
    """
    match = re.fullmatch(r"(\d+(?:\.\d+)?)\s*([KMGT]?)B?", text.strip().upper())
    if match is None:
        raise SubjectBoothError(
            f"the size {text[:40]!r}", "a number with KB, MB, GB or TB", "write it like 5GB", "limit"
        )
    return int(float(match[1]) * _UNITS[match[2]])


def format_size(size: float) -> str:
    """Format a number of bytes, such as ``"1.2 GB"``."""
    unit = next((unit for unit in _UNITS if size >= _UNITS[unit]), "")
    return f"{size / _UNITS[unit]:.1f} {unit}B" if unit else f"{size:.0f} B"


def disk_limit() -> int:
    """The limit in bytes: from :data:`LIMIT_VARIABLE` if set, otherwise :data:`DEFAULT_LIMIT`."""
    text = os.environ.get(LIMIT_VARIABLE, "")
    try:
        return parse_size(text) if text.strip() else DEFAULT_LIMIT
    except SubjectBoothError as error:
        logger.warning("%s: %s", LIMIT_VARIABLE, error)
        return DEFAULT_LIMIT


def survey(runs: Path, class_images: Path, loras: Iterable[Path]) -> list[DiskItem]:
    """List all runs and sets of class images, oldest first, with the reason to keep each.

    A run is kept while ``loras`` contains a LoRA of it or while a program uses it. If no program uses it, the LoRAs of
    its other steps, which could only be chosen in place of that one, are an item that may be removed. Class images are
    kept while such a run was trained with them. Folders are recognised by their content; others and links are ignored.

    Args:
        runs: the folder that contains all runs.
        class_images: the folder that contains all sets of class images.
        loras: folders with LoRA files, searched recursively.

    Raises:
        SubjectBoothError: a LoRA or a LoRA folder cannot be read.
    """
    keys = _run_keys_of_loras(loras, (runs, class_images))
    items, stores = [], set()
    for folder in _subfolders(runs):
        record = read_json_object(folder / "run.json")
        key = record.get("key")
        if not (isinstance(key, str) and len(key) == 64 and folder.name.endswith(f"_{key[:12]}")):
            continue
        size, changed = _size_and_mtime(folder)
        keep_reason = "in use" if _in_use(folder, changed) else "its LoRA exists" if key in keys else ""
        if keep_reason:
            stores.add(record.get("class_images"))
        others = _other_steps(folder) if key in keys and keep_reason != "in use" else ()
        if others:
            freed = sum(path.stat().st_size for path in others)
            items.append(DiskItem(folder, "other steps", freed, changed, files=others))
            size -= freed
        items.append(DiskItem(folder, "run", size, changed, keep_reason))
    for folder in _subfolders(class_images):
        if not ({"prompt", "base_digest", "seed"} <= read_json_object(folder / "recipe.json").keys()):
            continue
        size, changed = _size_and_mtime(folder)
        keep_reason = "in use" if _in_use(folder, changed) else "a run needs them" if folder.name in stores else ""
        items.append(DiskItem(folder, "class images", size, changed, keep_reason))
    return sorted(items, key=lambda item: item.changed)


def choose_removable(items: Sequence[DiskItem], limit: int) -> list[DiskItem]:
    """The oldest removable items: as many as must be removed to bring the total down to ``limit`` bytes."""
    total, chosen = sum(item.size for item in items), []
    for item in sorted(items, key=lambda item: item.changed):
        if total <= limit:
            break
        if not item.keep_reason:
            chosen.append(item)
            total -= item.size
    return chosen


def remove_items(items: Iterable[DiskItem]) -> int:
    """Delete the items and return the bytes freed. Folders that are locked by now are kept."""
    freed = 0
    for item in items:
        try:
            freed += remove_item(item)
        except (SubjectBoothError, OSError) as error:
            logger.warning("%s was not removed: %s", item.path, error)
    return freed


def remove_item(item: DiskItem) -> int:
    """Delete one item and return the bytes freed.

    Raises:
        SubjectBoothError: the folder is locked by now.
        OSError: a file cannot be deleted; those before it are gone.
    """
    with lock_folder(item.path):
        for path in item.files or sorted(item.path.iterdir()):
            if path.name != LOCK_NAME:
                shutil.rmtree(path) if path.is_dir() and not path.is_symlink() else path.unlink()
    if not item.files:
        shutil.rmtree(item.path)
    return item.size


def remember_lora_folders(output: Path, folders: Iterable[Path]) -> None:
    """Store the paths of ComfyUI's LoRA folders in ``output``. Disk errors are ignored: they must not fail a run."""
    record = {"folders": [str(folder.absolute()) for folder in folders if folder.is_dir()]}
    if read_json_object(output / LORA_FOLDERS) != record:
        with contextlib.suppress(OSError):
            write_atomic(output / LORA_FOLDERS, json.dumps(record))


def remembered_lora_folders(output: Path) -> list[Path]:
    """The folders stored by :func:`remember_lora_folders`, including missing ones (such as on an unplugged drive)."""
    names = read_json_object(output / LORA_FOLDERS).get("folders")
    return [Path(name) for name in names if isinstance(name, str)] if isinstance(names, list) else []


def over_limit_note(output: Path) -> str:
    """A sentence for the user if disk usage exceeds the limit, otherwise empty.

    Args:
        output: the folder that contains runs and class images.
    """
    total = _size_and_mtime(output)[0]
    if total <= disk_limit():
        return ""
    return (
        f"runs and class images take {format_size(total)} (limit {format_size(disk_limit())}): in the pack's folder, "
        f'python -m trainer clean --limit {format_size(disk_limit()).replace(" ", "")} --output_dir "{output}" '
        "shows what can be removed"
    )


def _other_steps(folder: Path) -> tuple[Path, ...]:
    """The LoRAs of a run that are neither a result nor chosen or published."""
    try:
        found = read_results(folder)
    except OSError:
        return ()
    used = {result.step for result in found.results.values()} | {*found.chosen.values(), found.published.get("step")}
    # Without any result, the run is unfinished, or from an earlier version: its last step is what counts.
    steps = saved_steps(folder)
    return tuple(lora_path(folder, step) for step in steps[:-1] if step not in used)


def _in_use(folder: Path, changed: float) -> bool:
    return time.time() - changed < RECENT or is_locked(folder)


def _run_keys_of_loras(folders: Iterable[Path], ours: Sequence[Path]) -> set[str]:
    """The run keys of all LoRAs in the folders. Adapters inside run folders do not count.

    Args:
        folders: LoRA folders.
        ours: the folders of runs and class images.

    Raises:
        SubjectBoothError: a file cannot be read, so its run is unknown.
    """
    keys = set()
    places = [place.resolve() for place in ours]
    for folder in folders:
        for path in _find_loras(folder.resolve()):
            # The path is not resolved: an adapter that is linked into a LoRA folder is in use.
            if any(path.is_relative_to(place) for place in places):
                continue
            try:
                keys.add(read_metadata(path).get("subjectbooth.run_key", ""))
            except (SubjectBoothError, FileNotFoundError):  # damaged or of another program; a broken link
                continue
            except OSError as error:
                raise _unreadable_error("a LoRA", error, path) from error
    return keys - {""}


def _unreadable_error(what: str, error: OSError, where: Path | str) -> SubjectBoothError:
    return SubjectBoothError(
        f"{what} cannot be opened ({error.strerror or type(error).__name__})",
        "read access to every LoRA, because the runs of existing LoRAs are kept",
        "change its permissions, or move it elsewhere",
        str(where),
    )


def _find_loras(folder: Path) -> Iterator[Path]:
    """All LoRA files, found like ComfyUI does: linked folders are followed.

    Raises:
        SubjectBoothError: a folder cannot be read.
    """

    def raise_unreadable(error: OSError) -> None:
        if isinstance(error, FileNotFoundError):
            return
        raise _unreadable_error("a LoRA folder", error, error.filename) from error

    seen = set()
    for root, inside, names in os.walk(folder, followlinks=True, onerror=raise_unreadable):
        real = Path(root).resolve()
        if real in seen:  # links form a loop
            inside.clear()
            continue
        seen.add(real)
        yield from (Path(root, name) for name in names if name.lower().endswith(".safetensors"))


def _subfolders(root: Path) -> list[Path]:
    if not root.is_dir():
        return []
    return sorted(path for path in root.iterdir() if path.is_dir() and not path.is_symlink())


def _size_and_mtime(folder: Path) -> tuple[int, float]:
    """Total bytes, and the latest modification time. The lock file is skipped, because checking the lock touches it."""
    size, changed = 0, 0.0
    for path in folder.rglob("*"):
        with contextlib.suppress(OSError):
            if path.name != LOCK_NAME and path.is_file() and not path.is_symlink():
                status = path.stat()
                size, changed = size + status.st_size, max(changed, status.st_mtime)
    return size, changed
