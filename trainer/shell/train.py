"""The training command: builds the recipe, trains with a progress bar, and publishes the LoRA."""

from __future__ import annotations

import argparse
import logging
import os
import sys
from collections.abc import Iterator, Sequence
from contextlib import closing, contextmanager, redirect_stderr, redirect_stdout
from pathlib import Path

import torch

from ..events import Adjusted, Finished, Started, StepDone, Studying, Validation
from ..machine.processes import ProcessEnded, current, joined, launched_rank
from ..runs.publish import check_folder, publish
from ..runs.recipe import Recipe
from ..runs.result import BEST, CHOSEN
from ..runs.run import Run
from ..runs.step_grid import write_step_grid
from .exit_code import exit_code_of
from .options import LATEST, parser
from .recipe import read_recipe, with_planned_preservation, with_preservation
from .terms import note_in_shell
from .trackers import Tracker

STOPPED = "stopped; progress is saved, run the same command again to resume"


def main(arguments: Sequence[str]) -> int:
    """Train; returns the exit code. Errors go to stderr without a traceback; on a signal, progress is saved."""
    options = parser().parse_args(arguments)
    return exit_code_of(lambda: _with_others(options), STOPPED, _is_told_here)


def _with_others(options: argparse.Namespace) -> None:
    with joined(options.cpu) as processes, _output_of_main():
        _train(options, processes.device or (torch.device("cpu") if options.cpu else None))


def _is_told_here(error: BaseException) -> bool:
    """The main process knows of errors of the others, unless it was killed."""
    return launched_rank() == 0 or (isinstance(error, ProcessEnded) and error.was_killed)


@contextmanager
def _output_of_main() -> Iterator[None]:
    """Of several processes, only the main one prints."""
    if current().is_main:
        yield
        return
    logging.getLogger().setLevel(logging.ERROR)
    with Path(os.devnull).open("w", encoding="utf-8") as nowhere, redirect_stdout(nowhere), redirect_stderr(nowhere):
        yield


def _train(options: argparse.Namespace, device: torch.device | None) -> None:
    recipe = read_recipe(options, device)
    if options.plan:
        print(_plan(with_planned_preservation(recipe, options), options, device))
        return
    run = with_preservation(recipe, options, device).run(options.output_dir / "runs", device)
    finished = _follow(run, recipe, options)
    if not current().is_main:
        return
    published = publish(finished.path, options.output_dir, options.output_name)
    if published.note:
        print(f"note: {published.note}", file=sys.stderr)
    done = "trained" if finished.trained else "already trained"
    if finished.warning:
        print(f"warning: {finished.warning}", file=sys.stderr)
        done += ", but nothing was learned"
    if run.result is not None and run.result.is_stopped:
        done += f" (stopped and kept at step {finished.step} of {recipe.config.steps})"
    elif run.result is not None and run.result.why == CHOSEN:
        done += f" (using step {finished.step}, chosen by --use_step)"
    elif run.result is not None and run.result.why == BEST:
        done += f" (using step {finished.step} of {recipe.config.steps}, the best: {run.reason})"
    if write_step_grid(run, run.validations(run.trained_steps)[0]) is not None:
        print(f"validation images of all steps: {run.folder.grid_path}")
    print(f"{done}: {published.path} (write {recipe.subject.trigger!r} in prompts)")


def _plan(recipe: Recipe, options: argparse.Namespace, device: torch.device | None) -> str:
    """The memory plan and the warnings of the run."""
    run = recipe.run(options.output_dir / "runs", device)
    plan = run.plan()
    return "\n".join(filter(None, [plan.sentence, plan.warning, *map(note_in_shell, run.warnings)]))


def _follow(run: Run, recipe: Recipe, options: argparse.Namespace) -> Finished:
    """Train with a progress bar and the requested tracker."""
    from tqdm import tqdm

    finished: Finished | None = None
    use_step = 0 if options.use_step == LATEST else options.use_step
    report_to = options.report_to if current().is_main else "none"
    if options.use_step == LATEST:
        run.stop_and_keep()
    # Closing the bar ends its line before anything else is printed, including errors.
    with (
        tqdm(total=recipe.config.steps, unit="step", dynamic_ncols=True) as bar,
        closing(Tracker(report_to, run.folder, recipe.config, bar.write)) as tracker,
        closing(run.events(options.force_retrain, options.after_stop == "continue", use_step)) as events,
    ):
        for event in events:
            tracker.follow(event)
            if isinstance(event, Started):
                if current().is_main:  # not earlier: reusing a finished run only reads
                    check_folder(options.output_dir, options.output_name)
                bar.update(event.step - bar.n)
                chosen = [f"{name} {value}" for name, value in event.chosen.items()]
                bar.write(", ".join([*chosen, *map(note_in_shell, event.notes)]))
                bar.write(event.plan)
            elif isinstance(event, StepDone):
                bar.set_postfix(loss=f"{event.loss:.4f}", refresh=False)
                bar.update(event.step - bar.n)
            elif isinstance(event, Studying):
                bar.set_postfix_str(f"studying the base {event.done}/{event.total}")
            elif isinstance(event, Adjusted):
                bar.write(event.note)
            elif isinstance(event, Validation):
                bar.write(f"validation images of step {event.step}: {run.folder.path / 'validation'}")
            elif isinstance(event, Finished):
                finished = event
    assert finished is not None
    return finished
