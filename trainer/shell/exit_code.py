"""How a command of the shell ends."""

from __future__ import annotations

import signal
import sys
from collections.abc import Callable

from ..errors import SubjectBoothError
from .signals import SignalInterrupt, signals_as_interrupts
from .terms import error_in_shell


def exit_code_of(
    work: Callable[[], int | None], stopped: str, is_told: Callable[[BaseException], bool] = lambda error: True
) -> int:
    """Run a command's work, and return its exit code: 0 if it returns None. Errors go to stderr without a traceback.

    Args:
        work: is interrupted by terminating signals as by Ctrl+C.
        stopped: what is said then.
        is_told: whether this process says why it ended; of several, one does.
    """
    try:
        with signals_as_interrupts():
            return work() or 0
    except SubjectBoothError as error:
        if is_told(error):
            print(error_in_shell(error), file=sys.stderr)
        return 2
    except KeyboardInterrupt as error:
        if is_told(error):
            print(stopped, file=sys.stderr)
        return 128 + (error.number if isinstance(error, SignalInterrupt) else signal.SIGINT)
