"""Trains the jobs of a grid and has them measured. What jobs have in common is loaded and encoded once."""

from __future__ import annotations

import functools
import sys
import time
from collections.abc import Callable
from contextlib import closing
from pathlib import Path
from typing import Any

import torch

from ..events import Event, Started, StepDone, Studying
from ..experiment.figures import SCORES
from ..experiment.jobs import Job
from ..experiment.progress import Progress
from ..experiment.records import Records
from ..experiment.spec import Measuring
from ..machine.runtime import default_device
from ..runs.encodings import EncodingCache
from ..runs.run import Run
from .grid_measure import Measurer
from .grid_options import namespace
from .grid_recipe import Recipes
from .grid_times import add_seconds
from .trackers import Tracker


class Worker:
    """Carries out jobs; see :data:`trainer.experiment.executor.CarryOut`. Nothing is loaded before the first one.

    Args:
        output_dir: for runs, class images and records, which all experiments share.
        measuring: what is measured.
        device: None for the GPU if there is one.
        report_to: the tracker of each run.

    Attributes:
        records: what was measured.
        progress: told of every step and measurement.
        report: shows what is being done.
        warn: shows a warning.
    """

    def __init__(
        self, output_dir: Path, measuring: Measuring, device: torch.device | None = None, report_to: str = "none"
    ) -> None:
        self._given = output_dir, measuring, device, report_to
        self._output, self._measuring = output_dir, measuring
        self._device, self._report_to = device, report_to
        self.records = Records(output_dir / "measured")
        self.progress = Progress()
        self.report: Callable[[str], None] = lambda text: None
        self.warn: Callable[[str], None] = lambda text: print(text, file=sys.stderr)
        self._measurer = Measurer(self.records, measuring, device or default_device())
        self._encodings = EncodingCache()
        self._recipes = Recipes(output_dir, device)

    def __reduce__(self) -> tuple[Any, ...]:
        return _worker, self._given

    @property
    def runs(self) -> Path:
        """The folder of all runs."""
        return self._output / "runs"

    def __call__(self, job: Job, records: dict[int, str]) -> None:
        """Train and measure a job; adds the name of each record, by steps."""
        done = 0
        try:
            options = namespace(job.options, job.steps[0], self._output)
            self.report(f"{job.name}: reading base and photos")
            recipe = self._recipes.recipe(options, self.warn)
            for steps in job.steps:
                run = recipe.vary(steps=steps).run(self.runs, self._device, encodings=self._encodings)
                self._train(job, run, steps, done)
                done = steps
                self.report(f"{job.name}: measuring step {steps}")
                records[steps], seconds = self._measurer.record(recipe, run, str(job.options["base"]))
                if seconds is None:
                    self.progress.found(self.progress.measurements, 1)
                else:
                    self.progress.did(self.progress.measurements, 1, seconds)
        finally:
            # What a failed job has not done is not left to do.
            self.progress.found(self.progress.steps, job.steps[-1] - done)
            self.progress.found(self.progress.measurements, len(job.steps) - len(records))

    def _train(self, job: Job, run: Run, steps: int, done: int) -> None:
        """Train from ``done`` steps, or from those of an earlier program, to ``steps``."""
        began, at, trained = time.monotonic(), done, False
        self._rescore(run, steps)
        with (
            closing(Tracker(self._report_to, run.folder, run.config, self.warn)) as tracker,
            closing(run.events()) as events,
        ):
            for event in events:
                tracker.follow(event)
                self._show(job, event)
                if isinstance(event, StepDone):
                    trained = True
                    self.progress.found(self.progress.steps, event.step - 1 - at)  # it resumed there
                    self.progress.did(self.progress.steps, 1, event.seconds)
                    at = event.step
        self.progress.found(self.progress.steps, steps - at)
        if trained:
            add_seconds(run.folder.path, steps, time.monotonic() - began)

    def _show(self, job: Job, event: Event) -> None:
        if isinstance(event, Started):
            self.report(f"{job.name}: from step {event.step} of {job.steps[-1]}")
        elif isinstance(event, StepDone):
            self.report(f"{job.name}: step {event.step} of {job.steps[-1]}")
        elif isinstance(event, Studying):
            self.report(f"{job.name}: studying the base {event.done}/{event.total}")

    def _rescore(self, run: Run, steps: int) -> None:
        """Let a run score its last step if it was killed between saving and scoring it: the LoRA is then saved again,
        from the checkpoint of the same step."""
        folder = run.folder
        if not run.config.kept_interval or not set(SCORES) & set(self._measuring.figures):
            return
        if steps in folder.scores(steps) or not folder.lora_path(steps).is_file():
            return
        saved = folder.load_checkpoint(steps)
        if saved is not None and saved.step == steps:
            with run.writer.lock():
                folder.lora_path(steps).unlink(missing_ok=True)


@functools.lru_cache(1)
def _worker(output_dir: Path, measuring: Measuring, device: torch.device | None, report_to: str) -> Worker:
    """That of a process, which keeps its base from one task to the next."""
    return Worker(output_dir, measuring, device, report_to)
