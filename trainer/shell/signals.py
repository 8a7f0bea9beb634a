"""Signals that would end the program end its training first, so that the steps so far are saved."""

from __future__ import annotations

import signal
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from types import FrameType

_TERMINATING = tuple(getattr(signal, name) for name in ("SIGTERM", "SIGHUP", "SIGBREAK") if hasattr(signal, name))
"""Signals that end a program without a word unless it listens; which of them there are depends on the system."""


class SignalInterrupt(KeyboardInterrupt):
    """A signal that ends the program, as Ctrl+C does."""

    def __init__(self, number: int) -> None:
        super().__init__(number)
        self.number = number


@contextmanager
def signals_as_interrupts() -> Iterator[None]:
    """Inside, a signal that would end the program raises :class:`SignalInterrupt`, so that progress is saved."""
    if threading.current_thread() is not threading.main_thread():
        yield  # Python lets nobody else handle signals
        return
    # nohup has SIGHUP ignored, and it stays so.
    before = {
        number: signal.getsignal(number) for number in _TERMINATING if signal.getsignal(number) is not signal.SIG_IGN
    }

    def end(number: int, frame: FrameType | None) -> None:
        for other in before:  # a second one would end the saving; Ctrl+C still can
            signal.signal(other, signal.SIG_IGN)
        raise SignalInterrupt(number)

    for number in before:
        signal.signal(number, end)
    try:
        yield
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
