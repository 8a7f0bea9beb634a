"""A lock per folder, so that two programs never write to the same run."""

from __future__ import annotations

import errno
import logging
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from ..errors import SubjectBoothError, require
from ..topics import Topic
from .storage import disk_errors, make_folder

LOCK_NAME = ".lock"

_LOCKS_UNSUPPORTED = (errno.ENOLCK, errno.ENOSYS, errno.EOPNOTSUPP, errno.ENOTSUP)

logger = logging.getLogger("subjectbooth")


@contextmanager
def lock_folder(folder: Path) -> Iterator[None]:
    """Hold an exclusive lock on ``folder``.

    The operating system releases the lock when the process ends, even after a crash, so there are no stale locks.
    File systems without locks (some network drives) only get a warning.

    Args:
        folder: created if missing.

    Raises:
        SubjectBoothError: another program holds the lock, or the folder is not writable.
    """
    require("filelock")
    from filelock import FileLock, Timeout

    with disk_errors("the run's folder cannot be written", folder):
        make_folder(folder)
        lock = FileLock(folder / LOCK_NAME, timeout=0)
        try:
            lock.acquire()
        except (NotImplementedError, OSError) as error:
            if isinstance(error, Timeout):  # a subclass of OSError, but not a disk error
                if _has_locks(folder):
                    raise SubjectBoothError(
                        "another program is training this run",
                        "one program per run",
                        "wait until it has finished (its result is then used here), or stop it there",
                        str(folder),
                        Topic.RUN_IN_PROGRESS,
                    ) from None
            elif isinstance(error, OSError) and error.errno not in _LOCKS_UNSUPPORTED:
                raise
            logger.warning("%s is on a drive without file locks: do not use it from two programs at once", folder)
    try:
        yield
    finally:
        lock.release()


def is_locked(folder: Path) -> bool:
    """Whether a program currently holds the lock on ``folder``."""
    require("filelock")
    from filelock import FileLock, Timeout

    if not (folder / LOCK_NAME).exists():
        return False
    lock = FileLock(folder / LOCK_NAME, timeout=0)
    try:
        lock.acquire()
    except Timeout:
        return _has_locks(folder)
    except (OSError, NotImplementedError):
        return False
    lock.release()
    return False


def _has_locks(folder: Path) -> bool:
    """Whether the drive supports locks: filelock before 3.21 reports one that does not as locked by somebody else."""
    try:
        import fcntl
    except ImportError:  # on Windows, filelock can tell the difference
        return True
    with (folder / LOCK_NAME).open("a") as file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError as error:
            return error.errno not in _LOCKS_UNSUPPORTED
    return True
