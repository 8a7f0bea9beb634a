"""A copy of an output folder at an address that fsspec knows, such as s3://bucket/prefix, for workers without a shared
folder: a run that one of them began resumes on another."""

from __future__ import annotations

import importlib
from pathlib import Path
from typing import Any

from ..errors import SubjectBoothError
from ..files.lock import LOCK_NAME
from ..files.storage import TEMP_PREFIX, write_atomic


class Mirror:
    """Copies files in both directions. They have the same relative names at both ends.

    Args:
        folder: the output folder of this machine.
        address: where the copy is.

    Raises:
        SubjectBoothError: the address cannot be used.
    """

    def __init__(self, folder: Path, address: str) -> None:
        self._folder, self._address = folder, address
        self._pushed: dict[Path, tuple[int, int]] = {}
        try:
            core: Any = importlib.import_module("fsspec.core")
            self._files, root = core.url_to_fs(address)
            self._files.makedirs(root, exist_ok=True)
        except Exception as error:  # each file system has its own
            raise self._problem(error, "the store cannot be used") from error
        self._root = str(root).rstrip("/")

    def pull(self, folder: Path) -> None:
        """Fetch all files of a folder, unless it exists here.

        Raises:
            SubjectBoothError: the copy cannot be read.
        """
        if folder.exists():
            return
        try:
            there = self._there(folder)
            if not self._files.exists(there):
                return
            for name in self._files.find(there):
                path = folder / str(name)[len(there) + 1 :]
                if path.name.startswith(TEMP_PREFIX):  # its worker was lost while copying
                    continue
                write_atomic(path, self._files.cat_file(name))
                self._pushed[path] = _state(path)
        except Exception as error:
            raise self._problem(error, f"{folder.name} cannot be fetched from the store") from error

    def push(self, path: Path) -> None:
        """Copy a file, or the files of a folder, that have changed since.

        Raises:
            SubjectBoothError: the copy cannot be written.
        """
        files = sorted(found for found in path.rglob("*") if found.is_file()) if path.is_dir() else [path]
        for file in files:
            if file.name == LOCK_NAME or file.name.startswith(TEMP_PREFIX):
                continue
            state = _state(file)
            if self._pushed.get(file) == state:
                continue
            try:
                self._put(self._there(file), file.read_bytes())
            except Exception as error:
                raise self._problem(error, f"{file.name} cannot be copied to the store") from error
            self._pushed[file] = state

    def _put(self, there: str, content: bytes) -> None:
        parent, _, name = there.rpartition("/")
        self._files.makedirs(parent, exist_ok=True)
        # Object stores write a file completely or not at all; folders need the move.
        part = f"{parent}/{TEMP_PREFIX}{name}"
        self._files.pipe_file(part, content)
        self._files.mv(part, there)

    def _there(self, path: Path) -> str:
        return f"{self._root}/{path.relative_to(self._folder).as_posix()}"

    def _problem(self, error: Exception, given: str) -> SubjectBoothError:
        return SubjectBoothError(
            f"{given} ({type(error).__name__}: {error})",
            "an address that fsspec can write to, such as s3://bucket/prefix (with pip install s3fs)",
            "correct the address or its credentials, and run the same command again",
            "store",
        )


def _state(path: Path) -> tuple[int, int]:
    found = path.stat()
    return found.st_mtime_ns, found.st_size
