"""What DreamBoothLoRATrain shows of a run: progress while it goes on, and one text when it has ended."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from ..trainer.events import Adjusted, Event, Finished, Started, StepDone, Studying, Validation, ValidationStep
from ..trainer.preserve.ways import loss_labels
from ..trainer.runs.publish import check_folder
from ..trainer.runs.result import BEST, CHOSEN, STOPPED, Result
from ..trainer.runs.run import Run
from . import live
from .graph_terms import event_in_graph
from .host import Progress, grid, loras_dirs, readable_seconds, stop_if_cancelled
from .lora_file import SubjectLora


def follow(events: Iterator[Event], progress: Progress, feed: live.Feed, output_name: str) -> tuple[Finished, str]:
    """Show the run's events as the node's progress. Closing the events on a cancel saves the work.

    Returns the final event and the memory plan, which is empty if nothing had to be trained.
    """
    finished: Finished | None = None
    steps, plan = 0, ""
    labels = loss_labels()
    try:
        for event in events:
            event = event_in_graph(event)
            feed.publish(event)
            stop_if_cancelled()
            if isinstance(event, Started):
                check_folder(loras_dirs()[0], output_name)  # not earlier: a run that is reused only reads
                steps, plan = event.steps, event.plan
                notes = "; ".join((event.plan, *event.notes))
                progress.set_text(f"training on {event.chosen['device']} in {event.chosen['precision']}; {notes}")
                progress.update(event.step)
            elif isinstance(event, StepDone):
                terms = ", ".join(f"{labels.get(name, name)} {loss:.4f}" for name, loss in event.losses.items())
                terms = f" ({terms})" if len(event.losses) > 1 else ""
                progress.update(
                    event.step,
                    f"step {event.step}/{event.steps}  loss {event.loss:.4f}{terms}  "
                    f"{event.seconds:.2f} s/step  ETA {readable_seconds(event.eta_seconds)}",
                )
            elif isinstance(event, Studying):
                progress.update(event.step, f"studying what the model knows  {event.done}/{event.total}")
            elif isinstance(event, Adjusted):
                progress.set_text(event.note)
            elif isinstance(event, ValidationStep):
                progress.update(event.step, f"step {event.step}/{steps}  drawing {event.done}/{event.total}")
            elif isinstance(event, Validation):
                progress.update(event.step, preview=grid(event.images))
            elif isinstance(event, Finished):
                finished = event
    finally:
        events.close()  # type: ignore[attr-defined]
    assert finished is not None
    return finished, plan


def result_of(result: Result, lora: SubjectLora, matched: int) -> dict[str, Any]:
    """The result for the panel. The file name is relative to the LoRA folder, so that no path of this machine leaks."""
    return {
        "lora": lora.path.relative_to(loras_dirs()[0]).as_posix(),
        "size": lora.path.stat().st_size,
        "matched": matched,
        "layers": matched,
        "trigger": lora.trigger,
        "step": result.step,
        "steps": result.steps,
        "why": result.why,
    }


def end_state(run: Run) -> str:
    """How the run itself has ended, whichever step the user chose: "finished", "kept", or "cancelled" if unfinished."""
    assert run.result is not None
    own = run.folder.result(run.result.steps) if run.result.why == CHOSEN else run.result
    return "cancelled" if own is None else "kept" if own.is_stopped else "finished"


def summary(finished: Finished, run: Run, lora: SubjectLora, matched: int) -> str:
    """One line for the node: how the run ended, the file, and the words to use in prompts."""
    result = run.result
    assert result is not None
    verb = "trained" if finished.trained else "reused (trained before)"
    verb += ", but nothing was learned" if finished.warning else ""
    size = lora.path.stat().st_size / 2**20
    note = {STOPPED: "stopped and kept", CHOSEN: "chosen by use_step", BEST: f"best: {run.reason}"}.get(result.why)
    step = f"step {result.step}" + (f" of {result.steps} ({note})" if note else "")
    return (
        f"{verb}: {lora.path.name}, {size:.1f} MB, {step}, matched {matched}/{matched}, use “{lora.trigger}” in prompts"
    )


def not_drawn_note(steps: list[int]) -> str:
    """What to do about validation images that a reused run does not have."""
    if not steps:
        return ""
    named = ", ".join(map(str, steps[:3])) + (f" and {len(steps) - 3} more" if len(steps) > 3 else "")
    return f"no validation images of step {named} for these prompts and settings; force_retrain creates them"
