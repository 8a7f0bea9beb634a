"""``python -m trainer batch``: trains a LoRA for each of many subjects."""

from __future__ import annotations

import argparse
import functools
import sys
import time
from collections.abc import Callable, Sequence
from contextlib import closing
from pathlib import Path
from typing import Any

import torch

from ..errors import SubjectBoothError
from ..events import CheckpointSaved, Finished, Started, StepDone
from ..experiment.jobs import Job
from ..experiment.on_ray import executor_of
from ..files.storage import disk_errors, make_folder, user_path
from ..runs.encodings import EncodingCache
from ..runs.mirror import Mirror
from ..runs.publish import publish
from ..runs.run import Run
from ..topics import Topic
from .batch_table import TABLE, BatchTable
from .exit_code import exit_code_of
from .grid_recipe import Recipes
from .subjects import options_of, read_subjects
from .trackers import Tracker
from .train import STOPPED

LONGEST_WAIT = 600.0
"""Seconds to wait for another program that trains the same run."""


class Subjects:
    """Trains subjects and publishes their LoRAs; see :data:`trainer.experiment.executor.CarryOut`.

    Args:
        output_dir: for LoRAs, runs and class images.
        cpu: train on the CPU.
        store: address of a copy of the output folder; empty for none.

    Attributes:
        report: shows what is being done.
        warn: shows a warning.
    """

    def __init__(self, output_dir: Path, cpu: bool, store: str = "") -> None:
        self._given = output_dir, cpu, store
        self._output, self._device = output_dir, torch.device("cpu") if cpu else None
        self._mirror = Mirror(output_dir, store) if store else None
        self._recipes, self._encodings = Recipes(output_dir, self._device), EncodingCache()
        self.report: Callable[[str], None] = lambda text: None
        self.warn: Callable[[str], None] = lambda text: print(text, file=sys.stderr)

    def __reduce__(self) -> tuple[Any, ...]:
        return _subjects, self._given

    def __call__(self, job: Job, records: dict[int, str]) -> None:
        """Train a subject; adds the name of the published file, by the step that it is of."""
        options = options_of(job)
        class_images = self._output / "class_images"
        self.report("reading base and photos")
        if self._mirror and options.num_class_images:
            self._mirror.pull(class_images)
        recipe = self._recipes.recipe(options, lambda text: self.warn(f"{job.name}: {text}"))
        self._recipes.forget_photos()
        run = recipe.run(self._output / "runs", self._device, encodings=self._encodings)
        if self._mirror:
            self._push(class_images)
            if not options.force_retrain:
                self._mirror.pull(run.folder.path)
        try:
            finished = self._train_in_turn(run, options)
        finally:
            self._push(run.folder.path)
        published = publish(finished.path, self._output, options.output_name).path
        self._push(published)
        records[finished.step] = published.relative_to(self._output).as_posix()

    def _train_in_turn(self, run: Run, options: argparse.Namespace) -> Finished:
        """Two subjects of a batch may be the same run, and a lost worker may hold its lock for a while."""
        began = time.monotonic()
        while True:
            try:
                return self._train(run, options)
            except SubjectBoothError as error:
                if error.about is not Topic.RUN_IN_PROGRESS or time.monotonic() - began > LONGEST_WAIT:
                    raise
            self.report("waiting for another program that trains the same run")
            time.sleep(1.0)

    def _train(self, run: Run, options: argparse.Namespace) -> Finished:
        with (
            closing(Tracker(options.report_to, run.folder, run.config, self.warn)) as tracker,
            closing(run.events(options.force_retrain, options.after_stop == "continue")) as events,
        ):
            for event in events:
                tracker.follow(event)
                if isinstance(event, (Started, StepDone)):
                    self.report(f"step {event.step} of {event.steps}")
                elif isinstance(event, CheckpointSaved):
                    self._push(run.folder.path)
                elif isinstance(event, Finished):
                    finished = event
        return finished

    def _push(self, path: Path) -> None:
        if self._mirror and path.exists():
            self._mirror.push(path)


@functools.lru_cache(1)
def _subjects(output_dir: Path, cpu: bool, store: str) -> Subjects:
    """Those of a worker, which keeps its base from one task to the next."""
    return Subjects(output_dir, cpu, store)


def parser() -> argparse.ArgumentParser:
    """The options of the batch command itself."""
    parsed = argparse.ArgumentParser(
        prog="python -m trainer batch",
        description="Trains a LoRA for each of many subjects. All other options are those of python -m trainer train, "
        "and apply to all subjects. The same command resumes a stopped batch; nothing is trained twice. See "
        "docs/many.md.",
        formatter_class=argparse.ArgumentDefaultsHelpFormatter,
        allow_abbrev=False,
    )
    parsed.add_argument(
        "subjects",
        type=user_path,
        help="A CSV file with the column photos and any option of a training, such as class_word, output_name, token "
        "or steps; or a folder that contains a folder of photos for each subject.",
    )
    parsed.add_argument(
        "--output_dir",
        type=user_path,
        default=Path("subjectbooth_output"),
        help=f"Folder for the LoRAs, their runs, and the table {TABLE}. Shared by all machines, unless there is a "
        "--store.",
    )
    parsed.add_argument(
        "--ray",
        action="store_true",
        help="Train one subject on each GPU of the Ray cluster that RAY_ADDRESS names, or of this machine. Without it, "
        "one after the other in this process.",
    )
    parsed.add_argument(
        "--store",
        default="",
        help="An address that fsspec can write to, such as s3://bucket/subjects, for a copy of LoRAs, runs, class "
        "images and table: machines without a shared folder resume each other's runs from there.",
    )
    parsed.add_argument("--list", action="store_true", help="Check and list the subjects, without training.")
    parsed.add_argument("--cpu", action="store_true", help="Use the CPU even if there is a GPU.")
    return parsed


def main(arguments: Sequence[str]) -> int:
    """Train all subjects; returns the exit code: 1 if one failed."""
    given, common = parser().parse_known_args(arguments)
    return exit_code_of(lambda: _run(given, common), STOPPED)


def _run(given: argparse.Namespace, common: Sequence[str]) -> int:
    output = given.output_dir.resolve()
    jobs = read_subjects(given.subjects.resolve(), common, output)
    if given.list:
        for job in jobs:
            print(f"{job.key}  {job.name}, {job.steps[0]} steps")
        return 0
    with disk_errors("the output folder cannot be written", output):
        make_folder(output)
    subjects = Subjects(output, given.cpu, given.store)
    mirror = Mirror(output, given.store) if given.store else None
    table = BatchTable(output / TABLE, [(job.key, job.name) for job in jobs], mirror)
    failed = _carry_out(jobs, subjects, given, table)
    where = f"{given.store.rstrip('/')}/{TABLE}" if given.store else output / TABLE
    print(f"{len(jobs) - failed} of {len(jobs)} subjects trained; table: {where}")
    return 1 if failed else 0


def _carry_out(jobs: Sequence[Job], subjects: Subjects, given: argparse.Namespace, table: BatchTable) -> int:
    """Returns how many subjects failed."""
    from tqdm import tqdm

    failed = 0
    names = {job.key: job.name for job in jobs}
    with tqdm(total=len(jobs), desc="subjects", dynamic_ncols=True) as bar:
        subjects.warn = bar.write

        def show(key: str, text: str) -> None:
            bar.set_postfix_str(f"{names[key]}: {text}")
            table.show(key, text)

        for outcome in executor_of(given.ray, bar.write, given.cpu, show)(jobs, subjects):
            if outcome.problem:
                failed += 1
                bar.write(f"failed: {names[outcome.job]}: {outcome.problem}")
            table.finish(outcome)
            bar.update()
    table.write()
    return failed
