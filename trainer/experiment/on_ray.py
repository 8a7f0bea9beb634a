"""An executor on Ray: one task for each run, on a GPU of its own, on this machine or on a cluster.

Workers need the same installation at the same path. A task whose worker is lost is started again elsewhere, where its
run resumes from what the lost worker saved.
"""

from __future__ import annotations

import functools
import importlib
import os
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any, Protocol

from .executor import Executor, Outcome, in_order
from .jobs import Job

RETRIES = 5
"""How often a run is started again because its worker was lost."""

REFRESH = 2.0
"""Seconds between two reports of what a worker is doing."""

LAST_WORDS = 60.0
"""Seconds that interrupted workers have to save their steps."""

Show = Callable[[str, str], None]
"""Is told the key of a job, and what its worker is doing."""


class Reporting(Protocol):
    """Carries out jobs in a worker; see :data:`trainer.experiment.executor.CarryOut`. It is pickled.

    Attributes:
        report: shows what is being done; set by the executor.
    """

    report: Callable[[str], None]

    def __call__(self, job: Job, records: dict[int, str]) -> None: ...


def executor_of(
    on_cluster: bool, warn: Callable[[str], None], cpu: bool, show: Show = lambda job, text: None
) -> Executor:
    """An executor on Ray; in order, with a warning, if Ray is not installed.

    Args:
        on_cluster: False for one run after the other in this process.
        warn: shows a warning.
        cpu: no run needs a GPU.
        show: is told what workers do.
    """
    alone = functools.partial(_shown, show=show)
    if not on_cluster:
        return alone
    try:
        importlib.import_module("ray")
    except Exception as error:  # a broken installation raises anything
        warn(
            f"warning: Ray cannot be used ({type(error).__name__}: {error}); the runs go in order on this machine. "
            'Install it with pip install "ray>=2.9"'
        )
        return alone
    return functools.partial(on_ray, cpu=cpu, show=show)


def on_ray(
    jobs: Sequence[Job], carry_out: Reporting, cpu: bool = False, show: Show = lambda job, text: None
) -> Iterator[Outcome]:
    """All jobs as tasks of the cluster that ``RAY_ADDRESS`` names; without it, of this machine.

    Args:
        cpu: a task takes a CPU core rather than a GPU; also if the cluster has no GPU.
        show: is told what workers do, about every :data:`REFRESH` seconds.
    """
    ray: Any = importlib.import_module("ray")
    os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")  # a cluster that is started here reports to nobody
    if not ray.is_initialized():
        path = os.pathsep.join(filter(None, [str(_import_root()), os.environ.get("PYTHONPATH", "")]))
        ray.init(log_to_driver=False, include_dashboard=False, runtime_env={"env_vars": {"PYTHONPATH": path}})
    gpus = 0 if cpu or not ray.cluster_resources().get("GPU") else 1
    task = ray.remote(num_cpus=1, num_gpus=gpus, max_retries=RETRIES)(_carry_out)
    board = ray.remote(num_cpus=0, max_restarts=-1)(_Board).remote()
    given = ray.put(carry_out)
    waiting = {task.remote(job, given, board): job for job in jobs}
    try:
        while waiting:
            done, _ = ray.wait(list(waiting), num_returns=1, timeout=REFRESH)
            for one in done:
                job = waiting.pop(one)
                try:
                    yield ray.get(one)
                except ray.exceptions.RayError as error:
                    yield Outcome(job.key, {}, f"the worker was lost: {str(error).splitlines()[0]}")
            with suppress(ray.exceptions.RayError):  # its machine was lost: the next one is empty
                news = ray.get(board.news.remote())
                for job in waiting.values():
                    if job.key in news:
                        show(job.key, news[job.key])
    finally:
        for left in waiting:
            ray.cancel(left)  # raises KeyboardInterrupt there: the run saves its steps
        if waiting:
            ray.wait(list(waiting), num_returns=len(waiting), timeout=LAST_WORDS)


def _shown(jobs: Sequence[Job], carry_out: Reporting, show: Show) -> Iterator[Outcome]:
    """In order, in this process."""
    for job in jobs:
        carry_out.report = functools.partial(show, job.key)
        yield from in_order([job], carry_out)


class _Board:
    """An actor to which workers pin what they are doing."""

    def __init__(self) -> None:
        self._news: dict[str, str] = {}

    def pin(self, job: str, text: str) -> None:
        self._news[job] = text

    def news(self) -> Mapping[str, str]:
        """What was pinned since the last call."""
        news, self._news = self._news, {}
        return news


def _carry_out(job: Job, carry_out: Reporting, board: Any) -> Outcome:
    last = 0.0

    def report(text: str) -> None:
        nonlocal last
        if time.monotonic() - last >= REFRESH:
            board.pin.remote(job.key, text)
            last = time.monotonic()

    carry_out.report = report
    (outcome,) = in_order([job], carry_out)
    return outcome


def _import_root() -> Path:
    """The folder from which this package is imported."""
    return Path(__file__).resolve().parents[len(__name__.split(".")) - 1]
