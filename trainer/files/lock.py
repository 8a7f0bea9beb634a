"""One run, one owner: two programs on the same folder must not write the same files."""

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

_WITHOUT_LOCKS = (errno.ENOLCK, errno.ENOSYS, errno.EOPNOTSUPP, errno.ENOTSUP)

logger = logging.getLogger("subjectbooth")


@contextmanager
def lock_folder(folder: Path) -> Iterator[None]:
    """Be the only one at work in ``folder``, or say who is not.

    The operating system holds the lock and gives it back when its process ends, however it ends, so a lock that is
    left behind by a crash is none. On file systems without locks (some network drives) it goes on with a warning.

    Args:
        folder: made when it is missing.

    Raises:
        SubjectBoothError: another program has it, or the folder cannot be written.
    """
    require("filelock")
    from filelock import FileLock, Timeout

    with disk_errors("the run's folder cannot be written", folder):
        make_folder(folder)
        lock = FileLock(folder / LOCK_NAME, timeout=0)
        try:
            lock.acquire()
        except (NotImplementedError, OSError) as error:
            if isinstance(error, Timeout):  # an OSError too, but not one of the disk
                if _has_locks(folder):
                    raise SubjectBoothError(
                        "a run that another process is training at this moment",
                        "one owner at a time",
                        "wait until it has finished, which this run then finds done, or stop it there",
                        str(folder),
                        Topic.RUN_IN_PROGRESS,
                    ) from None
            elif isinstance(error, OSError) and error.errno not in _WITHOUT_LOCKS:
                raise
            logger.warning("%s lies on a drive without file locks: do not use it from two programs", folder)
    try:
        yield
    finally:
        lock.release()


def is_locked(folder: Path) -> bool:
    """Whether a program is at work in ``folder`` at this moment."""
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
    """Whether its drive has locks: filelock before 3.21 takes one without them for a lock that somebody else has."""
    try:
        import fcntl
    except ImportError:  # Windows, where it tells them apart
        return True
    with (folder / LOCK_NAME).open("a") as file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError as error:
            return error.errno not in _WITHOUT_LOCKS
    return True
