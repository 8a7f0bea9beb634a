"""Remembers digests of large files and weights on disk, so that gigabytes are hashed once and not at every start.

A remembered digest is found by a key: a hash of everything that tells whether the content is still the same. For files
that is where each lies, its size, its times and a sample of its content (:func:`file_identity`). Whatever goes wrong
with the memory itself, such as a folder that cannot be written, only means that the content is hashed again.
"""

from __future__ import annotations

import contextlib
import os
import re
import sys
import time
from collections.abc import Callable, Sequence
from pathlib import Path

from .storage import canonical_json, remove_temp_files, sha256_of, write_atomic

FOLDER_VARIABLE = "SUBJECTBOOTH_CACHE"
"""The environment variable that overrides :func:`user_cache_folder`."""

MOST_KEPT = 200
"""Remembered digests, of 64 bytes each; the ones that were not needed for longest are removed."""

SAMPLES, SAMPLE_BYTES = 64, 1 << 14
"""Parts of a file that are compared, evenly spaced from its first byte to its last: 1 MiB in all."""

SETTLED_SECONDS = 3.0
"""Age from which a file's modification time tells two states apart; FAT counts in steps of 2 seconds."""

_DIGEST = re.compile(r"[0-9a-f]{64}")


class DigestMemory:
    """Digests by key, one small file each, so that processes never overwrite each other's.

    Args:
        folder: created when the first digest is kept; None, or a folder that cannot be written, keeps none.
    """

    def __init__(self, folder: Path | None) -> None:
        self._folder = folder

    def find(self, key: str) -> str | None:
        """The digest kept under a key; None if there is none."""
        if self._folder is None:
            return None
        path = self._folder / key
        try:
            found = path.read_text("ascii")
            if not _DIGEST.fullmatch(found):  # damaged
                return None
        except (OSError, ValueError):
            return None
        with contextlib.suppress(OSError):
            os.utime(path)  # the ones in use are kept
        return found

    def keep(self, key: str, digest: str) -> None:
        """Keep a digest.

        Args:
            key: 64 hex digits.
            digest: 64 hex digits.
        """
        if self._folder is None:
            return
        with contextlib.suppress(OSError):
            write_atomic(self._folder / key, digest)
            remove_temp_files(self._folder, older_than=3600)
            kept = [path for path in self._folder.iterdir() if _DIGEST.fullmatch(path.name)]
            for path in sorted(kept, key=lambda path: path.stat().st_mtime)[:-MOST_KEPT]:
                path.unlink()


def user_cache_folder() -> Path | None:
    """The current user's folder for digests: where the system keeps caches, or ``SUBJECTBOOTH_CACHE``."""
    chosen = os.environ.get(FOLDER_VARIABLE)
    if chosen:
        return Path(chosen)
    root = os.environ.get("LOCALAPPDATA" if sys.platform == "win32" else "XDG_CACHE_HOME")
    if not root:
        try:
            home = Path.home()
        except RuntimeError:  # a user without a home
            return None
        below = {"win32": ("AppData", "Local"), "darwin": ("Library", "Caches")}.get(sys.platform, (".cache",))
        root = str(home.joinpath(*below))
    return Path(root) / "subjectbooth" / "digests"


def digest_of_files(
    paths: Sequence[Path], others: str, compute: Callable[[], str], memory: DigestMemory | None = None
) -> str:
    """A digest of files and other values: a remembered one if the files are unchanged, otherwise computed and kept.

    Args:
        paths: the files.
        others: everything else that the digest depends on.
        compute: reads the files and returns 64 hex digits.
        memory: None for the user's.

    Raises:
        OSError: a file cannot be read.
    """
    memory = memory or DigestMemory(user_cache_folder())

    def key() -> str:
        return sha256_of("files 1", others, *map(file_identity, paths))

    before = key()
    found = memory.find(before)
    if found is None:
        found = compute()
        # A file that changed meanwhile, or could still change without another time, is not remembered.
        settled = all(time.time() - path.stat().st_mtime > SETTLED_SECONDS for path in paths)
        if settled and key() == before:
            memory.keep(before, found)
    return found


def file_identity(path: Path) -> str:
    """What tells whether a file is still the same: its place, size, times, and a sample of its content.

    The time of the last change of a file's metadata, which no program can set, is part of it, except on Windows, where
    it is the time of creation. So an edit in place after which the old modification time is restored is noticed; on
    Windows, if the sample contains it.

    Raises:
        OSError: the file cannot be read.
    """
    about = path.stat()
    with path.open("rb") as file:
        sample = []
        last = max(0, about.st_size - SAMPLE_BYTES)
        for number in range(SAMPLES):
            file.seek(last * number // (SAMPLES - 1))
            sample.append(file.read(SAMPLE_BYTES))
    times = [about.st_mtime_ns, about.st_ctime_ns]
    return canonical_json([str(path.resolve()), about.st_size, times, sha256_of(*sample)])
