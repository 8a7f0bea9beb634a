"""``python -m trainer experiment``: trains and measures a grid of runs, and writes a page about it."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path

import torch

from ..experiment.executor import Executor, Outcome, in_order
from ..experiment.jobs import Job, lay_out
from ..experiment.on_ray import executor_of
from ..experiment.page import PAGE, TIMES, make_page, write_page
from ..experiment.spec import Spec, read_spec
from ..files.storage import disk_errors, make_folder, user_path, write_atomic
from .exit_code import exit_code_of
from .grid_options import check_options, defaults, options
from .grid_times import times
from .grid_tracker import log_page
from .grid_worker import Worker
from .trackers import TRACKERS


def parser() -> argparse.ArgumentParser:
    """The options of the experiment command."""
    parsed = argparse.ArgumentParser(
        prog="python -m trainer experiment",
        description="Trains every combination of an experiment's axes and seeds, measures the LoRAs, and writes a page "
        "with table, curves and pictures. The same command resumes a stopped grid; nothing is trained twice. See "
        "docs/experiments.md.",
        formatter_class=argparse.ArgumentDefaultsHelpFormatter,
    )
    parsed.add_argument("experiment", type=user_path, help="TOML file, such as experiments/steps.toml.")
    parsed.add_argument(
        "--output_dir",
        type=user_path,
        default=Path("subjectbooth_experiments"),
        help="Folder for the pages; runs, class images and figures in it are shared by all experiments.",
    )
    parsed.add_argument(
        "--report_to",
        default="none",
        choices=TRACKERS,
        help="Also log every run, and the page's table and pictures, to TensorBoard or Weights & Biases.",
    )
    parsed.add_argument(
        "--ray",
        action="store_true",
        help="Train one run on each GPU of the Ray cluster that RAY_ADDRESS names, or of this machine. All machines "
        "need the output folder.",
    )
    parsed.add_argument("--list", action="store_true", help="List the runs, with their keys, without training.")
    parsed.add_argument("--cpu", action="store_true", help="Use the CPU even if there is a GPU.")
    return parsed


def main(arguments: Sequence[str], executor: Executor = in_order) -> int:
    """Run the grid; returns the exit code: 1 if a run failed.

    Args:
        arguments: of the command.
        executor: who carries out the runs.
    """
    given = parser().parse_args(arguments)
    return exit_code_of(
        lambda: _run(given, executor), "stopped; everything so far is saved, run the same command again to resume"
    )


def _run(given: argparse.Namespace, executor: Executor) -> int:
    spec = read_spec(given.experiment, options())
    points, jobs = lay_out(spec, defaults(), check_options)
    if given.list:
        for job in jobs:
            print(f"{job.key}  {job.name}, steps {', '.join(map(str, job.steps))}")
        return 0
    folder = given.output_dir / spec.name
    with disk_errors("the page of the experiment cannot be written", folder):
        make_folder(folder)  # now rather than after hours of training
    worker = Worker(
        given.output_dir.resolve(), spec.measuring, torch.device("cpu") if given.cpu else None, given.report_to
    )
    outcomes = _carry_out(jobs, worker, executor, given)
    page = make_page(spec, points, jobs, outcomes, worker.records)
    write_page(page, folder)
    axes = [axis.name for axis in spec.axes]
    with disk_errors("the times cannot be written", folder):
        write_atomic(folder / TIMES, times(axes, points, outcomes, worker.records, worker.runs))
    log_page(given.report_to, page, spec, folder, worker.warn)
    return _summary(spec, jobs, outcomes, folder)


def _carry_out(
    jobs: Sequence[Job], worker: Worker, executor: Executor, given: argparse.Namespace
) -> dict[str, Outcome]:
    from tqdm import tqdm

    outcomes: dict[str, Outcome] = {}
    progress = worker.progress
    progress.steps.left = sum(job.steps[-1] for job in jobs)
    progress.measurements.left = sum(len(job.steps) for job in jobs)
    names = {job.key: job.name for job in jobs}
    form = "{desc} {n_fmt}/{total_fmt} |{bar}| {elapsed}{postfix}"
    with tqdm(total=len(jobs), desc="runs", bar_format=form, dynamic_ncols=True) as bar:
        worker.warn = bar.write
        worker.report = lambda text: bar.set_postfix_str(", ".join(filter(None, [text, progress.remaining])))
        if given.ray:
            report = worker.report
            executor = executor_of(True, bar.write, given.cpu, lambda key, text: report(text))
        for outcome in executor(jobs, worker):
            outcomes[outcome.job] = outcome
            if outcome.problem:
                bar.write(f"failed: {names[outcome.job]}: {outcome.problem}")
            bar.update()
    worker.warn = lambda text: print(text, file=sys.stderr)
    return outcomes


def _summary(spec: Spec, jobs: Sequence[Job], outcomes: dict[str, Outcome], folder: Path) -> int:
    failed = [job for job in jobs if outcomes[job.key].problem]
    done = f"{len(jobs) - len(failed)} of {len(jobs)} runs" if failed else f"{len(jobs)} runs"
    print(f"{spec.name}: {done}; page: {folder / PAGE}")
    return 1 if failed else 0
