"""The validation images of a run as one table: a row for each step, a column for each prompt."""

from __future__ import annotations

import logging
from collections.abc import Sequence

import torch
from PIL import Image

from ..errors import SubjectBoothError
from ..files.labelled_grid import as_pictures, labelled_grid
from .result import CHOSEN, Result
from .run import Run

logger = logging.getLogger("subjectbooth")

MOST_ROWS = 32
"""Most steps in a table; of more, evenly spaced ones are shown."""

Validations = Sequence[tuple[int, torch.Tensor]]


def write_step_grid(run: Run, validations: Validations) -> Image.Image | None:
    """Draw the table and save it to the run's folder; a failure to save is only logged, because the run is finished.

    Args:
        run: a run that has ended.
        validations: see :meth:`trainer.runs.run.Run.validations`.

    Returns:
        the table; None if there are no images.
    """
    if not validations:
        return None
    assert run.result is not None
    picture = draw_step_grid(validations, run.validation_prompts, run.result)
    try:
        run.writer.write_grid(picture)
    except SubjectBoothError as error:
        logger.warning("%s", error)
    return picture


def draw_step_grid(validations: Validations, prompts: Sequence[str], result: Result) -> Image.Image:
    """Draw the table, with the row of the result's step marked.

    Args:
        validations: steps, and their images (float32 [n, h, w, 3] in 0..1), one for each prompt.
        prompts: the columns.
        result: the result of the run.
    """
    shown = _sample(validations, result.step)
    marks = {row: _word(result) for row, (step, _) in enumerate(shown) if step == result.step}
    pictures = [as_pictures(images) for _, images in shown]
    return labelled_grid(pictures, [f"step {step}" for step, _ in shown], prompts, marks)


def _word(result: Result) -> str:
    return "chosen by you" if result.why == CHOSEN else result.why


def _sample(validations: Validations, step: int) -> Validations:
    """At most :data:`MOST_ROWS`, evenly spaced, with the last one and that of the step."""
    if len(validations) <= MOST_ROWS:
        return validations
    count = MOST_ROWS - 1  # and one more for the step
    chosen = {validations[(number + 1) * len(validations) // count - 1][0] for number in range(count)}
    return [pair for pair in validations if pair[0] in chosen or pair[0] == step]
