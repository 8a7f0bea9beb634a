"""A batch in order, and the same one on a Ray cluster of two workers, one of which is killed in the middle of a run.

python ray_driver.py FOLDER VICTIM ARGUMENTS, those of the batch; prints one JSON line: both exit codes, and of the
cluster the steps that were trained, the number of processes that trained, and whether one was killed.
"""

from __future__ import annotations

import functools
import json
import os
import signal
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

# Workers import the package by the same name as this process does.
sys.path.insert(0, str(Path(__file__).resolve().parents[3]))

import ray

from trainer.experiment.jobs import Job
from trainer.learn import loop
from trainer.shell import batch


class Watched:
    """Subjects of which one is killed before its second step, once."""

    def __init__(self, subjects: batch.Subjects, folder: Path, victim: str) -> None:
        self._subjects, self._folder, self._victim = subjects, folder, victim

    @property
    def report(self) -> Callable[[str], None]:
        return self._subjects.report

    @report.setter
    def report(self, value: Callable[[str], None]) -> None:
        self._subjects.report = value

    warn = report

    def __call__(self, job: Job, records: dict[int, str]) -> None:
        whole, log, killed = loop.Training._learn, self._folder / "trained", self._folder / "killed"

        def learn(training: Any, *given: Any) -> Any:
            if job.name == self._victim and training.step == 1 and not killed.exists():
                killed.touch()
                os.kill(os.getpid(), signal.SIGKILL)
            with log.open("a", encoding="utf-8") as file:
                file.write(f"{job.name} {training.step + 1} {os.getpid()}\n")
            return whole(training, *given)

        loop.Training._learn = learn  # type: ignore[method-assign]
        try:
            self._subjects(job, records)
        finally:
            loop.Training._learn = whole  # type: ignore[method-assign]


def main(folder: Path, victim: str, arguments: list[str]) -> None:
    # By default, Ray starts a worker on each core.
    ray.init = functools.partial(ray.init, num_cpus=2, object_store_memory=80_000_000)
    in_order = batch.main([*arguments, "--output_dir", str(folder / "in order")])
    whole = batch.Subjects
    batch.Subjects = lambda *given: Watched(whole(*given), folder, victim)  # type: ignore[misc, assignment]
    on_ray = batch.main([*arguments, "--output_dir", str(folder / "on Ray"), "--ray"])
    rows = [line.split() for line in (folder / "trained").read_text("utf-8").splitlines()]
    steps, workers = [" ".join(row[:2]) for row in rows], {row[2] for row in rows}
    found = {"codes": [in_order, on_ray], "trained": sorted(steps), "workers": len(workers)}
    print(json.dumps({**found, "killed": (folder / "killed").exists()}))


if __name__ == "__main__":
    main(Path(sys.argv[1]), sys.argv[2], sys.argv[3:])
