"""Writing so that nothing half-written is ever seen, and hashing what was written."""

from __future__ import annotations

import contextlib
import errno
import hashlib
import json
import os
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import torch

from ..errors import SubjectBoothError
from ..topics import Topic

TEMP_PREFIX = ".subjectbooth-"
"""Begins the name of every file that is being written, so that what a killed program leaves behind can be told."""


_PAUSES = (0.05, 0.2, 1.0) if os.name == "nt" else ()
"""Seconds. Windows refuses to replace a file that somebody reads, such as a virus scanner, which is soon done."""


def write_atomic(path: Path, content: bytes | str | Callable[[Path], None]) -> None:
    """Write ``path`` in one step: beside it, flushed to the disk, then renamed over it, and the new name flushed too.

    Args:
        path: the final name; its folder is made when it is missing.
        content: bytes, text (written as UTF-8), or a function that writes the file it is given (safetensors, PIL).

    Raises:
        OSError: the folder cannot be written; the old file, if any, is untouched.
    """
    make_folder(path.parent)
    # PIL chooses the format by the suffix. Otherwise it is one that no list of LoRAs or pictures shows.
    suffix = path.suffix if callable(content) else ".part"
    handle, name = tempfile.mkstemp(prefix=TEMP_PREFIX, suffix=suffix, dir=path.parent)
    os.close(handle)
    beside = Path(name)
    try:
        if callable(content):
            content(beside)
        else:
            beside.write_bytes(content.encode("utf-8") if isinstance(content, str) else content)
        with beside.open("rb+") as file:
            os.fsync(file.fileno())
        _give_default_mode(beside)
        rename(beside, path)
    finally:
        with contextlib.suppress(FileNotFoundError):
            beside.unlink()


def rename(source: Path, target: Path) -> None:
    """Rename a file over ``target`` in the same folder, so that after a power cut the name is still the new one."""
    for pause in _PAUSES:
        try:
            os.replace(source, target)
            break
        except PermissionError:
            time.sleep(pause)
    else:
        os.replace(source, target)
    _flush_names(target.parent)


def user_path(text: str) -> Path:
    """A path as it is typed in a shell: ``--base=~/x`` reaches a program with its ``~``."""
    try:
        return Path(text).expanduser()
    except RuntimeError:  # there is no such user, so it is a name like any other
        return Path(text)


def make_folder(folder: Path) -> None:
    """Make a folder and the missing ones above it, so that a power cut does not take them with what is then in them."""
    missing = []
    for path in (folder, *folder.parents):
        if path.exists():
            break
        missing.append(path)
    folder.mkdir(parents=True, exist_ok=True)
    for path in reversed(missing):
        _flush_names(path.parent)


def _flush_names(folder: Path) -> None:
    """The names in a folder are content of its own: until it is flushed, a power cut may bring the old ones back."""
    if os.name == "nt":
        return  # a folder cannot be opened there, and NTFS writes renames to its journal itself
    # Some file systems (network drives, FUSE) refuse. What was written is in its place then, only not yet for certain.
    with contextlib.suppress(OSError):
        handle = os.open(folder, os.O_RDONLY)
        try:
            os.fsync(handle)
        finally:
            os.close(handle)


@contextlib.contextmanager
def disk_errors(what: str, folder: Path) -> Iterator[None]:
    """Inside, what the disk refuses becomes a sentence.

    Args:
        what: was to be written, with its verb ("the checkpoint cannot be saved").
        folder: where.

    Raises:
        SubjectBoothError: for any OSError.
    """
    try:
        yield
    except OSError as error:
        reason = error.strerror or str(error) or type(error).__name__
        needed, todo, about = _remedy(error, folder)
        raise SubjectBoothError(f"{what} ({reason})", needed, todo, str(folder), about) from error


def _remedy(error: OSError, folder: Path) -> tuple[str, str, Topic | None]:
    """What the disk needs, what to do about it, and whether another output folder helps."""
    still_there = "what was saved before is still there"
    if error.errno == errno.ENOENT:
        gone = "the file in it" if folder.is_dir() else "the folder"
        return (
            f"{gone}, which was deleted or moved meanwhile",
            "leave the folder alone while it is in use, and start again: what was in it has to be made again",
            None,
        )
    if error.errno in (errno.ENOSPC, getattr(errno, "EDQUOT", errno.ENOSPC)):  # Windows has no quota error
        return "room on the disk", f"free some space; {still_there}", Topic.OUTPUT_FOLDER
    if error.errno in (errno.EACCES, errno.EPERM, errno.EROFS):
        return (
            "the right to write there",
            f"make the folder writable, or use another output folder; {still_there}",
            Topic.OUTPUT_FOLDER,
        )
    return (
        "room on the disk and the right to write there",
        f"free some space, make the folder writable, or use another output folder; {still_there}",
        Topic.OUTPUT_FOLDER,
    )


def remove_temp_files(folder: Path, older_than: float = 0.0) -> None:
    """Remove what a killed program has left half-written in ``folder``.

    Args:
        older_than: seconds; where somebody else may be writing at this moment, an hour.
    """
    for path in folder.glob(f"{TEMP_PREFIX}*"):
        with contextlib.suppress(OSError):
            if time.time() - path.stat().st_mtime >= older_than:
                path.unlink()


def _give_default_mode(path: Path) -> None:
    """mkstemp makes files only the owner may read; a LoRA is read by whoever may read the folder's other files."""
    if os.name == "posix":
        mask = os.umask(0)
        os.umask(mask)
        path.chmod(0o666 & ~mask)


def canonical_json(value: Any) -> str:
    """The one spelling of ``value`` that hashes are taken of: sorted keys, no spaces, no NaN.

    Raises:
        ValueError: a float is NaN or infinite.
    """
    return json.dumps(value, sort_keys=True, separators=(",", ":"), ensure_ascii=False, allow_nan=False)


def sha256_of(*parts: bytes | str | torch.Tensor | Path) -> str:
    """Hex SHA-256 over ``parts``, each preceded by its kind and length so that no two lists of parts meet.

    A tensor counts with dtype, shape and bytes (moved to the CPU); a Path counts by the file's content, not its name.
    """
    digest = hashlib.sha256()
    for part in parts:
        if isinstance(part, torch.Tensor):
            tensor = part.detach().to("cpu").contiguous()
            digest.update(f"tensor {tensor.dtype} {tuple(tensor.shape)};".encode())
            # numpy has no bfloat16 and no float8: hash the bytes themselves.
            digest.update(tensor.reshape(-1).view(torch.uint8).numpy().data)
        elif isinstance(part, Path):
            digest.update(f"file {part.stat().st_size};".encode())
            with part.open("rb") as file:
                while block := file.read(1 << 20):
                    digest.update(block)
        else:
            data = part.encode("utf-8") if isinstance(part, str) else part
            digest.update(f"bytes {len(data)};".encode())
            digest.update(data)
    return digest.hexdigest()
