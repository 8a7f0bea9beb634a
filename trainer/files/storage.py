"""Atomic writes, disk errors as readable messages, and hashing."""

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
"""Prefix of temporary files, so that those left by a killed program can be found and removed."""

_RETRY_DELAYS = (0.05, 0.2, 1.0) if os.name == "nt" else ()
"""Seconds. Windows cannot replace a file while another program, such as a virus scanner, reads it."""


Parts = tuple[bytes | memoryview, ...]


def write_atomic(path: Path, content: bytes | str | Parts | Callable[[Path], None]) -> None:
    """Write ``path`` atomically: to a temporary file, flushed to disk, then renamed; the rename is flushed too.

    Args:
        path: the final path; its folder is created if missing.
        content: bytes, or several parts of them; text (written as UTF-8); or a function that writes to the path it is
            given (PIL).

    Raises:
        OSError: the folder is not writable; an existing file is left unchanged.
    """
    make_folder(path.parent)
    # PIL chooses the format by the suffix. ".part" keeps other temporary files out of lists of LoRAs and images.
    suffix = path.suffix if callable(content) else ".part"
    handle, name = tempfile.mkstemp(prefix=TEMP_PREFIX, suffix=suffix, dir=path.parent)
    os.close(handle)
    temporary = Path(name)
    try:
        if callable(content):
            content(temporary)
        else:
            content = content.encode("utf-8") if isinstance(content, str) else content
            with temporary.open("wb") as file:
                file.writelines(content if isinstance(content, tuple) else (content,))
        with temporary.open("rb+") as file:
            os.fsync(file.fileno())
        _apply_umask(temporary)
        rename(temporary, path)
    finally:
        with contextlib.suppress(FileNotFoundError):
            temporary.unlink()


def rename(source: Path, target: Path) -> None:
    """Replace ``target`` with a file from the same folder, durably: the new name survives a power cut."""
    for delay in _RETRY_DELAYS:
        try:
            os.replace(source, target)
            break
        except PermissionError:
            time.sleep(delay)
    else:
        os.replace(source, target)
    _fsync_folder(target.parent)


def user_path(text: str) -> Path:
    """Expand ``~`` in a path; shells leave it as it is in ``--base=~/x``."""
    try:
        return Path(text).expanduser()
    except RuntimeError:  # no such user: an ordinary file name
        return Path(text)


def make_folder(folder: Path) -> None:
    """Create a folder and its missing parents durably, so that a power cut cannot lose them with their content."""
    missing = []
    for path in (folder, *folder.parents):
        if path.exists():
            break
        missing.append(path)
    folder.mkdir(parents=True, exist_ok=True)
    for path in reversed(missing):
        _fsync_folder(path.parent)


def _fsync_folder(folder: Path) -> None:
    """Flush a folder's entries to disk; until then, a power cut may undo renames in it."""
    if os.name == "nt":
        return  # folders cannot be opened on Windows, and NTFS journals renames itself
    # Not supported by some file systems (network drives, FUSE); the file is in place, but may not survive a power cut.
    with contextlib.suppress(OSError):
        handle = os.open(folder, os.O_RDONLY)
        try:
            os.fsync(handle)
        finally:
            os.close(handle)


@contextlib.contextmanager
def disk_errors(what: str, folder: Path) -> Iterator[None]:
    """Turn any OSError in the block into a readable error.

    Args:
        what: what failed, as a clause ("the checkpoint cannot be saved").
        folder: the folder being written to.

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
    """What is required, what to do about it, and whether another output folder helps."""
    nothing_lost = "what was saved before is still there"
    if error.errno == errno.ENOENT:
        missing = "the file in it" if folder.is_dir() else "the folder"
        return (
            f"{missing}, which was deleted or moved in the meantime",
            "leave the folder alone while it is in use, and start again; its content has to be rebuilt",
            None,
        )
    if error.errno in (errno.ENOSPC, getattr(errno, "EDQUOT", errno.ENOSPC)):  # Windows has no EDQUOT
        return "free disk space", f"free some space; {nothing_lost}", Topic.OUTPUT_FOLDER
    if error.errno in (errno.EACCES, errno.EPERM, errno.EROFS):
        return (
            "write permission",
            f"make the folder writable, or use another output folder; {nothing_lost}",
            Topic.OUTPUT_FOLDER,
        )
    return (
        "free disk space and write permission",
        f"free some space, make the folder writable, or use another output folder; {nothing_lost}",
        Topic.OUTPUT_FOLDER,
    )


def remove_temp_files(folder: Path, older_than: float = 0.0) -> None:
    """Remove temporary files that a killed program has left in ``folder``.

    Args:
        older_than: minimum age in seconds; use an hour where another program may be writing.
    """
    for path in folder.glob(f"{TEMP_PREFIX}*"):
        with contextlib.suppress(OSError):
            if time.time() - path.stat().st_mtime >= older_than:
                path.unlink()


def _apply_umask(path: Path) -> None:
    """Give a file default permissions: mkstemp creates files that only their owner can read."""
    if os.name == "posix":
        mask = os.umask(0)
        os.umask(mask)
        path.chmod(0o666 & ~mask)


def read_chosen_file(path: Path, what: str) -> bytes:
    """The content of a file that the user has named.

    Args:
        what: its name in messages, such as "the experiment".

    Raises:
        SubjectBoothError: it cannot be read.
    """
    try:
        return path.read_bytes()
    except OSError as error:
        reason = error.strerror or type(error).__name__
        raise SubjectBoothError(
            f"{what} cannot be read ({reason})", "a readable file", "check the path", str(path)
        ) from error


def read_json_object(path: Path) -> dict[str, Any]:
    """The JSON object in a file; empty if there is no such file, or it cannot be read or is damaged."""
    try:
        values = json.loads(path.read_bytes())
    except (OSError, ValueError, RecursionError):
        return {}
    return values if isinstance(values, dict) else {}


def canonical_json(value: Any) -> str:
    """Canonical JSON for hashing: sorted keys, no spaces, no NaN.

    Raises:
        ValueError: a float is NaN or infinite.
    """
    return json.dumps(value, sort_keys=True, separators=(",", ":"), ensure_ascii=False, allow_nan=False)


def sha256_of(*parts: bytes | str | torch.Tensor | Path) -> str:
    """Hex SHA-256 of ``parts``, each prefixed with its type and length so that different lists never collide.

    A tensor is hashed as dtype, shape and bytes (moved to the CPU), a Path as the file's content without its name.
    """
    digest = hashlib.sha256()
    for part in parts:
        if isinstance(part, torch.Tensor):
            tensor = part.detach().to("cpu").contiguous()
            digest.update(f"tensor {tensor.dtype} {tuple(tensor.shape)};".encode())
            # numpy has no bfloat16 or float8, so hash the raw bytes.
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
