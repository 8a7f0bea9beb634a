"""Turns terminating signals into exceptions, so that training saves its progress."""

from __future__ import annotations

import signal
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from types import FrameType

_TERMINATING = tuple(getattr(signal, name) for name in ("SIGTERM", "SIGHUP", "SIGBREAK") if hasattr(signal, name))
"""Signals that by default terminate the program immediately; which ones exist depends on the system."""


class SignalInterrupt(KeyboardInterrupt):
    """A terminating signal, handled like Ctrl+C.

    Args:
        number: the signal's number.
    """

    def __init__(self, number: int) -> None:
        super().__init__(number)
        self.number = number


@contextmanager
def signals_as_interrupts() -> Iterator[None]:
    """Inside, a terminating signal raises :class:`SignalInterrupt`. Has no effect outside of the main thread."""
    if threading.current_thread() is not threading.main_thread():
        yield  # Python allows signal handlers only there
        return
    # A signal that is ignored, such as SIGHUP under nohup, stays ignored.
    before = {
        number: signal.getsignal(number) for number in _TERMINATING if signal.getsignal(number) is not signal.SIG_IGN
    }

    def end(number: int, frame: FrameType | None) -> None:
        for other in before:  # a second signal must not interrupt saving; Ctrl+C still can
            signal.signal(other, signal.SIG_IGN)
        raise SignalInterrupt(number)

    for number in before:
        signal.signal(number, end)
    try:
        yield
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
