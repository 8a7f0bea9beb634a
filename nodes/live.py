"""What the panel on DreamBoothLoRATrain is told while a run goes on, and how it stops one.

Nothing here changes a run but :meth:`trainer.runs.run.Run.stop_and_keep`, when a user asks for it.
"""

from __future__ import annotations

import threading
import time
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from server import PromptServer

from ..trainer.events import (
    Adjusted,
    CheckpointSaved,
    Event,
    Finished,
    Started,
    StepDone,
    Validation,
    ValidationStep,
    to_json,
)
from ..trainer.runs.history import points_of
from ..trainer.runs.run import Run
from .host import Cancelled, memory_in_use, versioned_entry

EVENT = "subjectbooth.train"
INTERVAL = 0.3
"""Seconds between two messages: a few a second is what an eye follows."""

MOST_POINTS = 40
"""Points of a curve in one message, however quick the steps are; the run's log has all of them."""

_active: dict[str, Feed] = {}
_lock = threading.Lock()
_stale: Counter[str] = Counter()


def active(run: str) -> Feed | None:
    """The feed of a run that is being trained now, by its folder's name."""
    with _lock:
        return _active.get(run)


def all_active() -> list[Feed]:
    """The feeds of all runs that are being trained now."""
    with _lock:
        return list(_active.values())


def generation(after_stop: str) -> str:
    """Changes when results that ComfyUI may have cached for a node with this ``after_stop`` are out of date.

    A run that was stopped and kept is unfinished for whoever says "continue"; one that then went on is another result
    for whoever says "keep".
    """
    return f"{after_stop} {_stale[after_stop]}"


def went_on() -> None:
    """A run that had been stopped and kept is trained further (or anew)."""
    _stale["keep"] += 1


class Feed:
    """Turns a run's events into a few messages a second.

    Args:
        place: "node", as ComfyUI names it, in subgraphs with its path ("12:3"), and "workflow".
        run: may be stopped through :meth:`stop_and_keep`.
        steps: planned.
        device: whose memory is shown.
    """

    def __init__(self, place: dict[str, str], run: Run, steps: int, device: torch.device) -> None:
        self._run, self._device = run, device
        self._now: dict[str, Any] = {
            **place,
            "run": run.folder.path.name,
            "state": "preparing",
            "step": 0,
            "steps": steps,
        }
        self._news: dict[str, Any] = {}
        self._series: dict[str, list[list[float]]] = {}
        self._sent = self._hurried = float("-inf")

    @property
    def name(self) -> str:
        """Of the run's folder."""
        return str(self._now["run"])

    def now(self) -> dict[str, Any]:
        """Where the run is: node, workflow, run, state, step, steps and, once known, seconds a step, ETA and memory."""
        return dict(self._now)

    def stop_and_keep(self) -> None:
        """See :meth:`trainer.runs.run.Run.stop_and_keep`."""
        self._now["state"] = "stopping"
        self._run.stop_and_keep()

    def note(self, event: Event) -> None:
        """Take an event in; send what has come together when the last message is long enough ago."""
        self._now["step"] = event.step
        stopping = self._now["state"] == "stopping"
        at_once = True
        if isinstance(event, StepDone):
            self._now |= {"seconds": event.seconds, "eta": event.eta_seconds}
            for name, value in points_of(to_json(event)).items():
                self._series.setdefault(name, []).append([event.step, value])
            at_once = False
        elif isinstance(event, Started):
            self._news |= {"chosen": event.chosen, "notes": [note for note in (event.plan, *event.notes) if note]}
        elif isinstance(event, Adjusted):
            self._news |= {"chosen": event.chosen, "note": event.note}
        elif isinstance(event, ValidationStep):
            self._now["drawn"] = [event.done, event.total]
            at_once = False
        elif isinstance(event, Validation):
            pictures = self._run.folder.pictures(event.step, len(event.prompts))
            self._news.setdefault("validations", []).append(
                {"step": event.step, "prompts": event.prompts, "images": [versioned_entry(path) for path in pictures]}
            )
        elif isinstance(event, CheckpointSaved):
            if self._run.folder.lora_path(event.step).is_file():
                self._news.setdefault("saved", []).append(event.step)
            at_once = False
        elif isinstance(event, Finished):
            # The file is still to be published and checked: the node says when all is done.
            self._news.setdefault("saved", []).append(event.step)
            if event.trained and event.step < self._now["steps"]:
                _stale["continue"] += 1
        if not stopping:
            self._now["state"] = "drawing" if isinstance(event, ValidationStep) else "training"
        # Pictures do not wait for the next message, but a finished run that is found again tells all of its at once.
        now = time.monotonic()
        at_once = at_once and now - self._hurried >= INTERVAL
        if at_once:
            self._hurried = now
        if at_once or now - self._sent >= INTERVAL:
            self.send()

    def end(self, state: str, result: dict[str, Any] | None = None) -> None:
        """The last message. ``state``: "finished", "kept", "cancelled" or "failed"."""
        self._now["state"] = state
        if result is not None:
            self._news["result"] = result
        self.send()

    def send(self) -> None:
        """Hand the message to the server's own thread; nobody waits for a browser here."""
        self._now["memory"] = memory_in_use(self._device)
        series = {name: _thinned(points) for name, points in self._series.items()}
        message = {**self._now, **self._news, "series": series}
        self._news, self._series = {}, {}
        server = PromptServer.instance
        server.send_sync(EVENT, message, server.client_id)
        self._sent = time.monotonic()


@contextmanager
def feed(place: dict[str, str], run: Run, steps: int, device: torch.device) -> Iterator[Feed]:
    """A feed that the routes find by the run's name as long as the block runs."""
    made = Feed(place, run, steps, device)
    with _lock:
        _active[made.name] = made
    try:
        made.send()
        yield made
    except BaseException as error:
        made.end("cancelled" if isinstance(error, Cancelled) else "failed")
        raise
    finally:
        with _lock:
            if _active.get(made.name) is made:
                del _active[made.name]


def _thinned(points: list[list[float]]) -> list[list[float]]:
    if len(points) <= MOST_POINTS:
        return points
    return [points[(number + 1) * len(points) // MOST_POINTS - 1] for number in range(MOST_POINTS)]
