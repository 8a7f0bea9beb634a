"""Live updates for the panel on DreamBoothLoRATrain, and its stop button.

Nothing here affects a run, except :meth:`trainer.runs.run.Run.stop_and_keep` at the user's request.
"""

from __future__ import annotations

import re
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
    Scores,
    Started,
    StepDone,
    Studying,
    Validation,
    ValidationStep,
    to_json,
)
from ..trainer.runs.best_step import share_curves
from ..trainer.runs.history import curve_points
from ..trainer.runs.result import CHOSEN
from ..trainer.runs.run import Run
from .host import Cancelled, memory_in_use, versioned_entry

EVENT = "subjectbooth.train"
INTERVAL = 0.3
"""Seconds between messages; more than a few per second would not be noticed."""

MOST_POINTS = 40
"""Maximum points of a curve per message, however fast the steps are; the run's log has all of them."""

SHORT = 120
"""Maximum length of an error on the panel; ComfyUI itself shows all of it."""

MOST_ENDED = 100

_active: dict[str, Feed] = {}
_ended: dict[str, dict[str, Any]] = {}
_lock = threading.Lock()
_stale: Counter[str] = Counter()


def active(run: str) -> Feed | None:
    """The feed of a run in training, by the name of its folder."""
    with _lock:
        return _active.get(run)


def all_active() -> list[Feed]:
    """The feeds of all runs in training."""
    with _lock:
        return list(_active.values())


def ended(run: str) -> dict[str, Any] | None:
    """How the last training of a run ended in this process, if it was cancelled or failed: state, step and error.

    The run's log does not tell the two apart.
    """
    with _lock:
        return _ended.get(run)


def generation(after_stop: str) -> str:
    """Changes when results that ComfyUI cached for a node with this ``after_stop`` have become stale.

    A run that was stopped and kept is unfinished for "continue"; once resumed, its result has changed for "keep".
    """
    return f"{after_stop} {_stale[after_stop]}"


def mark_kept_results_stale() -> None:
    """Call when a run that was stopped and kept is resumed or retrained."""
    _stale["keep"] += 1


class Feed:
    """Turns a run's events into a few messages per second.

    Args:
        place: "node", ComfyUI's node id (a path inside subgraphs, "12:3"), and "workflow".
        run: the run; :meth:`stop_and_keep` stops it.
        steps: the planned steps.
        device: the device whose memory is shown.
        done: the step from which the run will resume.
    """

    def __init__(self, place: dict[str, str], run: Run, steps: int, device: torch.device, done: int = 0) -> None:
        self._run, self._device = run, device
        self._state: dict[str, Any] = {
            **place,
            "run": run.folder.path.name,
            "state": "preparing",
            "step": done,
            "steps": steps,
        }
        self._pending: dict[str, Any] = {}
        self._series: dict[str, list[list[float]]] = {}
        self._sent = self._sent_urgent = float("-inf")

    @property
    def name(self) -> str:
        """Name of the run's folder."""
        return str(self._state["run"])

    def state(self) -> dict[str, Any]:
        """Current state: node, workflow, run, state, step, steps and, once known, seconds per step, ETA and memory."""
        return dict(self._state)

    def stop_and_keep(self) -> None:
        """See :meth:`trainer.runs.run.Run.stop_and_keep`."""
        self._state["state"] = "stopping"
        self._run.stop_and_keep()

    def publish(self, event: Event) -> None:
        """Queue an event; send what is queued if the last message is old enough."""
        if isinstance(event, Finished):
            # A finished run shows how far it is trained, whichever of its steps is the result.
            self._state["step"] = self._run.trained_steps
        elif not isinstance(event, Scores):  # those of the base come with step 0, also when a run resumes
            self._state["step"] = event.step
        state = "stopping" if self._state["state"] == "stopping" else "training"
        urgent = True
        if isinstance(event, StepDone):
            self._state |= {"seconds": event.seconds, "eta": event.eta_seconds}
            for name, value in curve_points(to_json(event)).items():
                self._series.setdefault(name, []).append([event.step, value])
            urgent = False
        elif isinstance(event, Started):
            self._pending |= {"chosen": event.chosen, "notes": [note for note in (event.plan, *event.notes) if note]}
        elif isinstance(event, Adjusted):
            self._pending |= {"chosen": event.chosen, "note": event.note}
        elif isinstance(event, Scores):
            self._pending["scores"] = share_curves(self._run.folder.scores(event.step))
            urgent = False
        elif isinstance(event, Studying | ValidationStep):
            self._state["part"] = [event.done, event.total]
            if state == "training":
                state = "studying" if isinstance(event, Studying) else "drawing"
            urgent = False
        elif isinstance(event, Validation):
            pictures = self._run.folder.validation_paths(event.step, len(event.prompts))
            self._pending.setdefault("validations", []).append(
                {"step": event.step, "prompts": event.prompts, "images": [versioned_entry(path) for path in pictures]}
            )
        elif isinstance(event, CheckpointSaved):
            if self._run.folder.lora_path(event.step).is_file():
                self._pending.setdefault("saved", []).append(event.step)
            urgent = False
        elif isinstance(event, Finished):
            # The LoRA is not yet published and checked: the node calls end() when that is done.
            state = "saving" if event.trained else "reusing"
            if self._run.result is not None and self._run.result.why == CHOSEN:
                state, self._state["used"] = "using", event.step
            self._pending.setdefault("saved", []).append(event.step)
            if event.trained and self._run.result is not None and self._run.result.is_stopped:
                _stale["continue"] += 1
        self._state["state"] = state
        # Images are sent immediately, but a finished run that is reused reports all of its images at once.
        now = time.monotonic()
        urgent = urgent and now - self._sent_urgent >= INTERVAL
        if urgent:
            self._sent_urgent = now
        if urgent or now - self._sent >= INTERVAL:
            self.send()

    def end(self, state: str, result: dict[str, Any] | None = None) -> None:
        """Send the last message. ``state``: "finished", "kept", or "cancelled" if the run is unfinished."""
        self._state["state"] = state
        if result is not None:
            self._pending["result"] = result
        self.send()

    def fail(self, error: BaseException) -> None:
        """Send the last message of a training that was cancelled or failed, with the step that it resumes from."""
        self._state["step"] = self._run.folder.resumable_step(self._state["steps"])
        self._state["state"] = "cancelled" if isinstance(error, Cancelled) else "failed"
        self._state["error"] = "" if isinstance(error, Cancelled) else first_sentence(error)
        with _lock:
            _ended[self.name] = {name: self._state[name] for name in ("state", "step", "error")}
            while len(_ended) > MOST_ENDED:
                del _ended[next(iter(_ended))]
        self.send()

    def send(self) -> None:
        """Pass the message to the server's thread, without waiting for a browser."""
        self._state["memory"] = memory_in_use(self._device)
        series = {name: _thinned(points) for name, points in self._series.items()}
        message = {**self._state, **self._pending, "series": series}
        self._pending, self._series = {}, {}
        server = PromptServer.instance
        server.send_sync(EVENT, message, server.client_id)
        self._sent = time.monotonic()


@contextmanager
def feed(place: dict[str, str], run: Run, steps: int, device: torch.device, done: int = 0) -> Iterator[Feed]:
    """A feed that the routes can find by the run's name while the block runs."""
    opened = Feed(place, run, steps, device, done)
    with _lock:
        _active[opened.name] = opened
        _ended.pop(opened.name, None)
    try:
        opened.send()
        yield opened
    except BaseException as error:
        opened.fail(error)
        raise
    finally:
        with _lock:
            if _active.get(opened.name) is opened:
                del _active[opened.name]


def first_sentence(error: BaseException) -> str:
    """What is wrong, without what follows: one line of at most :data:`SHORT` characters."""
    text = re.split(r"(?<=[.!?])\s", " ".join(str(error).split()), maxsplit=1)[0] or type(error).__name__
    return text if len(text) <= SHORT else f"{text[: SHORT - 1].rstrip()}…"


def _thinned(points: list[list[float]]) -> list[list[float]]:
    if len(points) <= MOST_POINTS:
        return points
    return [points[(number + 1) * len(points) // MOST_POINTS - 1] for number in range(MOST_POINTS)]
