"""One run, one owner: two programs on the same folder must not write the same files."""

from __future__ import annotations

import logging
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from .errors import SubjectBoothError

logger = logging.getLogger("subjectbooth")


@contextmanager
def owned(folder: Path) -> Iterator[None]:
    """Be the only one at work in ``folder``, or say who is not.

    The operating system holds the lock and gives it back when its process ends, however it ends, so a lock that is
    left behind by a crash is none. On file systems without locks (some network drives) it goes on with a warning.

    Raises:
        SubjectBoothError: another program has it.
        OSError: the folder cannot be written.
    """
    from filelock import FileLock, Timeout

    folder.mkdir(parents=True, exist_ok=True)
    lock = FileLock(folder / ".lock", timeout=0)
    try:
        lock.acquire()
    except Timeout:
        raise SubjectBoothError(
            "a run that another ComfyUI (or a shell) is training at this moment", "one owner at a time",
            "wait until it has finished, which this run then finds done, or stop it there", str(folder)) from None
    except NotImplementedError:
        logger.warning("%s lies on a drive without file locks: do not train the same run from two programs", folder)
        yield
        return
    try:
        yield
    finally:
        lock.release()
