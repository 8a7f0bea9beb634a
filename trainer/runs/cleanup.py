"""Keeping the disk bounded: what the runs and the class images take, and which of them nobody needs any more.

Nothing here acts by itself. A survey says what there is, a choice says what would go, and only then it is removed.
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
from ..files.storage import write_atomic

logger = logging.getLogger("subjectbooth")

DEFAULT_LIMIT = 20 * 10**9
"""Bytes that runs and class images together may take before it is said. A run of SD 1.5 at rank 16 takes about 60 MB
with its checkpoint, and 13 MB more for every validation."""
LIMIT_VARIABLE = "SUBJECTBOOTH_DISK_LIMIT"
LORA_FOLDERS = "lora_folders.json"
"""In the pack's output folder: where ComfyUI looks for LoRAs. extra_model_paths.yaml may name any folder, and a run
whose LoRA nobody finds would seem to be nobody's."""
RECENT = 3600
"""Seconds in which what was changed counts as in use: class images have no lock, and a graph makes them first."""

_UNITS = {"T": 10**12, "G": 10**9, "M": 10**6, "K": 10**3, "": 1}


@dataclass(frozen=True)
class DiskItem:
    """One folder of ours.

    Attributes:
        path: the folder.
        kind: ``run`` or ``class images``.
        size: bytes.
        changed: Unix time of the last change in it.
        needed: why it stays; empty when it may go.
    """

    path: Path
    kind: str
    size: int
    changed: float
    keep_reason: str = ""


def parse_size(text: str) -> int:
    """``"5GB"``, ``"500 MB"`` or a number of bytes.

    Raises:
        SubjectBoothError: something else.
    """
    match = re.fullmatch(r"(\d+(?:\.\d+)?)\s*([KMGT]?)B?", text.strip().upper())
    if match is None:
        raise SubjectBoothError(f"the size {text[:40]!r}", "a number with KB, MB, GB or TB", "write it as 5GB", "limit")
    return int(float(match[1]) * _UNITS[match[2]])


def format_size(size: float) -> str:
    """``"1.2 GB"``."""
    unit = next((unit for unit in _UNITS if size >= _UNITS[unit]), "")
    return f"{size / _UNITS[unit]:.1f} {unit}B" if unit else f"{size:.0f} B"


def disk_limit() -> int:
    """The limit that holds: that of the environment, else :data:`DEFAULT_LIMIT`."""
    text = os.environ.get(LIMIT_VARIABLE, "")
    try:
        return parse_size(text) if text.strip() else DEFAULT_LIMIT
    except SubjectBoothError as error:
        logger.warning("%s: %s", LIMIT_VARIABLE, error)
        return DEFAULT_LIMIT


def survey(runs: Path, class_images: Path, loras: Iterable[Path]) -> list[DiskItem]:
    """All runs and class images, the oldest first, and which of them somebody needs.

    A run stays while a LoRA of it lies in ``loras``, or while a program is at work in it; class images stay while such
    a run was made with them. Only folders that are ours by what is in them are looked at, and links never.

    Args:
        runs: the folder that holds all runs.
        class_images: likewise.
        loras: folders with LoRA files, searched with their sub-folders.

    Raises:
        SubjectBoothError: a LoRA there may not be read.
    """
    keys = _run_keys_of_loras(loras, (runs, class_images))
    items, stores = [], set()
    for folder in _subfolders(runs):
        record = _read_json(folder / "run.json")
        key = record.get("key")
        if not (isinstance(key, str) and len(key) == 64 and folder.name.endswith(f"_{key[:12]}")):
            continue
        size, changed = _size_and_mtime(folder)
        keep_reason = "in use" if _in_use(folder, changed) else "its LoRA is there" if key in keys else ""
        if keep_reason:
            stores.add(record.get("class_images"))
        items.append(DiskItem(folder, "run", size, changed, keep_reason))
    for folder in _subfolders(class_images):
        if not ({"prompt", "base_digest", "seed"} <= _read_json(folder / "recipe.json").keys()):
            continue
        size, changed = _size_and_mtime(folder)
        keep_reason = "in use" if _in_use(folder, changed) else "a run needs them" if folder.name in stores else ""
        items.append(DiskItem(folder, "class images", size, changed, keep_reason))
    return sorted(items, key=lambda item: item.changed)


def choose_removable(items: Sequence[DiskItem], limit: int) -> list[DiskItem]:
    """The oldest that nobody needs, as many as have to go so that the rest is within ``limit`` bytes."""
    total, chosen = sum(item.size for item in items), []
    for item in sorted(items, key=lambda item: item.changed):
        if total <= limit:
            break
        if not item.keep_reason:
            chosen.append(item)
            total -= item.size
    return chosen


def remove_items(items: Iterable[DiskItem]) -> int:
    """Remove them; the bytes that were freed. What somebody has begun to use meanwhile stays."""
    freed = 0
    for item in items:
        try:
            with lock_folder(item.path):
                for path in sorted(item.path.iterdir()):
                    if path.name != LOCK_NAME:
                        shutil.rmtree(path) if path.is_dir() and not path.is_symlink() else path.unlink()
            shutil.rmtree(item.path)
            freed += item.size
        except (SubjectBoothError, OSError) as error:
            logger.warning("%s stays: %s", item.path, error)
    return freed


def remember_lora_folders(output: Path, folders: Iterable[Path]) -> None:
    """Note in ``output`` which folders ComfyUI has its LoRAs in. A disk that refuses is no reason to end a run."""
    record = {"folders": [str(folder.absolute()) for folder in folders if folder.is_dir()]}
    if _read_json(output / LORA_FOLDERS) != record:
        with contextlib.suppress(OSError):
            write_atomic(output / LORA_FOLDERS, json.dumps(record))


def remembered_lora_folders(output: Path) -> list[Path]:
    """What :func:`remember_lora_folders` has noted; one that is gone (a drive that is not plugged in) is named too."""
    names = _read_json(output / LORA_FOLDERS).get("folders")
    return [Path(name) for name in names if isinstance(name, str)] if isinstance(names, list) else []


def over_limit_note(output: Path) -> str:
    """A sentence for who has just finished a run and fills the disk; empty below the limit.

    Args:
        output: the folder with runs and class images.
    """
    total = _size_and_mtime(output)[0]
    if total <= disk_limit():
        return ""
    return (
        f"runs and class images take {format_size(total)} (limit {format_size(disk_limit())}): in the pack's folder, "
        f'python -m trainer clean --limit {format_size(disk_limit()).replace(" ", "")} --output_dir "{output}" '
        "shows what could go"
    )


def _in_use(folder: Path, changed: float) -> bool:
    return time.time() - changed < RECENT or is_locked(folder)


def _run_keys_of_loras(folders: Iterable[Path], ours: Sequence[Path]) -> set[str]:
    """The runs of all LoRAs there; the adapters in the runs' own folders keep nothing alive.

    Raises:
        SubjectBoothError: a file may not be read, so that nobody knows which run it needs.
    """
    keys = set()
    places = [place.resolve() for place in ours]
    for folder in folders:
        for path in _find_loras(folder.resolve()):
            # Not where a link in the folder leads: an adapter that is linked into it is in use there.
            if any(path.is_relative_to(place) for place in places):
                continue
            try:
                keys.add(read_metadata(path).get("subjectbooth.run_key", ""))
            except (SubjectBoothError, FileNotFoundError):  # damaged or a stranger's; a link whose file is gone
                continue
            except OSError as error:
                raise _unreadable_error("a LoRA", error, path) from error
    return keys - {""}


def _unreadable_error(what: str, error: OSError, where: Path | str) -> SubjectBoothError:
    return SubjectBoothError(
        f"{what} that cannot be opened ({error.strerror or type(error).__name__})",
        "a look into every LoRA, because their runs stay",
        "change its permissions, or move it elsewhere",
        str(where),
    )


def _find_loras(folder: Path) -> Iterator[Path]:
    """As ComfyUI finds them: behind linked folders too.

    Raises:
        SubjectBoothError: a folder may not be looked into.
    """

    def raise_unreadable(error: OSError) -> None:
        if isinstance(error, FileNotFoundError):
            return
        raise _unreadable_error("a LoRA folder", error, error.filename) from error

    seen = set()
    for root, inside, names in os.walk(folder, followlinks=True, onerror=raise_unreadable):
        real = Path(root).resolve()
        if real in seen:  # a loop of links
            inside.clear()
            continue
        seen.add(real)
        yield from (Path(root, name) for name in names if name.lower().endswith(".safetensors"))


def _subfolders(root: Path) -> list[Path]:
    if not root.is_dir():
        return []
    return sorted(path for path in root.iterdir() if path.is_dir() and not path.is_symlink())


def _size_and_mtime(folder: Path) -> tuple[int, float]:
    """Bytes, and the time of the last change. The lock's own time says nothing: looking touches it."""
    size, changed = 0, 0.0
    for path in folder.rglob("*"):
        with contextlib.suppress(OSError):
            if path.name != LOCK_NAME and path.is_file() and not path.is_symlink():
                status = path.stat()
                size, changed = size + status.st_size, max(changed, status.st_mtime)
    return size, changed


def _read_json(path: Path) -> dict[str, object]:
    try:
        values = json.loads(path.read_text("utf-8"))
    except (OSError, ValueError, RecursionError):
        return {}
    return values if isinstance(values, dict) else {}
