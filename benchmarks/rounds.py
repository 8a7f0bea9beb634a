"""Runs the contestants: once to count, then in rounds to time, in random order in each."""

from __future__ import annotations

import os
import random
import statistics
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

from subjectbooth.tests.comfy_server import ComfyError

from .contestants import Contestant, ContestantFailed, Places
from .scene import Scene


@dataclass
class Measured:
    """What the runs have given.

    Attributes:
        counted: by contestant, what its counted run has found.
        timed: by contestant, what its timed runs have found, in order of the rounds.
        failed: by contestant, the message of the run that failed.
        loads: the machine's load average before each run; empty where the system has none.
    """

    counted: dict[str, dict[str, Any]] = field(default_factory=dict)
    timed: dict[str, list[dict[str, Any]]] = field(default_factory=dict)
    failed: dict[str, str] = field(default_factory=dict)
    loads: list[float] = field(default_factory=list)


def run_all(
    scene: Scene,
    places: Places,
    contestants: Sequence[Contestant],
    rounds: int,
    seed: int,
    measured: Measured | None = None,
    counts: bool = True,
    keep: Callable[[Measured], None] = lambda _: None,
) -> Measured:
    """Count and time all contestants. One that fails is left out from then on.

    Args:
        seed: of the order.
        measured: an earlier result on the same scene, to which rounds are added; who is counted there is not again.
        counts: whether to count at all.
        keep: called after each run with what there is so far.
    """
    measured = measured or Measured()
    order = random.Random(seed + len(measured.loads))
    uncounted = [contestant for contestant in contestants if contestant.name not in measured.counted]
    plan = [(contestant, True) for contestant in uncounted if counts]
    for _ in range(rounds):
        this_round = list(contestants)
        order.shuffle(this_round)
        plan += [(contestant, False) for contestant in this_round]
    progress = _Progress(len(plan))
    for contestant, is_counted in plan:
        name = contestant.name
        if name in measured.failed:
            progress.skip()
            continue
        if hasattr(os, "getloadavg"):
            measured.loads.append(os.getloadavg()[0])
        progress.start(f"{contestant.title}, {'counted' if is_counted else 'timed'}")
        # With more threads, some of them run where nothing is counted.
        here = replace(scene, threads=1) if is_counted and scene.device == "cpu" else scene
        try:
            output = places.scratch / f"{name}-{'counted' if is_counted else 'timed'}"
            found = contestant.run(here, places, output, is_counted)
        except (ContestantFailed, ComfyError) as error:
            measured.failed[name] = str(error)
            progress.done(f"FAILED: {str(error)[:2000]}")
            continue
        if is_counted:
            measured.counted[name] = found
        else:
            measured.timed.setdefault(name, []).append(found)
        keep(measured)
        step = statistics.median(found["wall"]) if found["wall"] else float("nan")
        progress.done(f"{step:.3f} s per step, {found['whole']:.0f} s in all")
    return measured


class _Progress:
    """A line per run on the terminal, with the time that is left."""

    def __init__(self, runs: int) -> None:
        self._runs, self._done, self._began = runs, 0, time.monotonic()

    def start(self, what: str) -> None:
        print(f"[{self._done + 1}/{self._runs}] {what} ... ", end="", file=sys.stderr, flush=True)

    def skip(self) -> None:
        self._runs -= 1

    def done(self, result: str) -> None:
        self._done += 1
        left = (time.monotonic() - self._began) / self._done * (self._runs - self._done)
        print(f"{result}; about {left / 60:.0f} min left", file=sys.stderr, flush=True)
