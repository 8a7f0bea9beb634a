"""The parts of a job: how long the base's reading, the hashing and so on take, measured inside the process."""

from __future__ import annotations

import builtins
import functools
import importlib
import sys
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

IMPORTS = "imports"


class _Thread:
    """The parts that a thread is in, innermost last, and since when."""

    def __init__(self) -> None:
        self.seconds: dict[str, float] = {}
        self.open: list[str] = []
        self.since = 0.0


class Parts:
    """Adds up seconds by part, of each thread by itself. A part inside another one counts for itself only."""

    def __init__(self) -> None:
        self._threads = threading.local()
        self._is_on = True

    @property
    def seconds(self) -> dict[str, float]:
        """By name, until :meth:`stop`, of the thread that asks: what others did meanwhile, it did not wait for."""
        return self._here.seconds

    @property
    def _here(self) -> _Thread:
        if not hasattr(self._threads, "here"):
            self._threads.here = _Thread()
        here: _Thread = self._threads.here
        return here

    def stop(self) -> None:
        """From now on, nothing is measured: the first step is done."""
        self._is_on = False

    @contextmanager
    def part(self, name: str) -> Iterator[None]:
        """What happens inside belongs to that part."""
        here = self._here
        self._switch(here)
        here.open.append(name)
        try:
            yield
        finally:
            self._switch(here)
            here.open.pop()

    def _switch(self, here: _Thread) -> None:
        now = time.perf_counter()
        if here.open and self._is_on:
            here.seconds[here.open[-1]] = here.seconds.get(here.open[-1], 0.0) + now - here.since
        here.since = now

    def measure_imports(self) -> None:
        """Whatever is imported from now on, wherever, belongs to the part ``imports``."""
        builtins.__import__ = self._outermost(builtins.__import__)
        importlib.import_module = self._outermost(importlib.import_module)

    def _outermost(self, load: Callable[..., Any]) -> Callable[..., Any]:
        @functools.wraps(load)
        def timed(*args: Any, **keywords: Any) -> Any:
            if not self._is_on or IMPORTS in self._here.open[-1:] or args[0] in sys.modules:
                return load(*args, **keywords)
            with self.part(IMPORTS):
                return load(*args, **keywords)

        return timed

    def measure(self, function: Callable[..., Any], name: str) -> Callable[..., Any]:
        """The same function, whose time belongs to that part."""

        @functools.wraps(function)
        def timed(*args: Any, **keywords: Any) -> Any:
            if not self._is_on:
                return function(*args, **keywords)
            with self.part(name):
                return function(*args, **keywords)

        return timed

    def measure_everywhere(self, module: str, names: tuple[str, ...], part: str) -> None:
        """Measure functions or methods ("function", "Class.method") of a loaded module, and wherever else they were
        imported to. What is not there is left out: other versions have other names.

        Args:
            module: the end of its name.
        """
        for found in [value for key, value in list(sys.modules.items()) if f".{key}".endswith(f".{module}")]:
            for name in names:
                *owner, last = name.split(".")
                holder = getattr(found, owner[0], None) if owner else found
                original = vars(holder).get(last) if holder is not None else None
                if original is None:
                    continue
                if isinstance(original, classmethod):
                    setattr(holder, last, classmethod(self.measure(original.__func__, part)))
                elif callable(original):
                    _replace_everywhere(holder, last, original, self.measure(original, part))


def _replace_everywhere(holder: Any, name: str, original: Any, instead: Any) -> None:
    setattr(holder, name, instead)
    if isinstance(holder, type):
        return
    for module in list(sys.modules.values()):
        for other, value in list(getattr(module, "__dict__", {}).items()):
            if value is original:
                setattr(module, other, instead)
