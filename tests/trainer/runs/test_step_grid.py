"""The table of a run's validation images: a row for each step, the result's marked, and saved where it does no harm."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

from subjectbooth.tests.trainer.runs.test_chosen_step import _run
from subjectbooth.tests.trainer.runs.test_run import _read
from subjectbooth.trainer.files.labelled_grid import MARK
from subjectbooth.trainer.files.storage import disk_errors
from subjectbooth.trainer.runs.result import CHOSEN, LAST, Result
from subjectbooth.trainer.runs.run import Run
from subjectbooth.trainer.runs.step_grid import MOST_ROWS, draw_step_grid, write_step_grid

SHOWN = {"steps": 3, "validation_prompts": ("{subject}",), "validation_interval": 2, "validation_steps": 1}


def _marked(sheet: Image.Image) -> np.ndarray:
    """Heights at which there is the colour of the mark, left of all pictures."""
    colour = Image.new("RGB", (1, 1), MARK).getpixel((0, 0))
    return np.flatnonzero((np.asarray(sheet)[:, 0] == colour).all(-1))


def _grey(step: int, size: int = 192) -> tuple[int, torch.Tensor]:
    """One image, as bright as its step is late."""
    return step, torch.full((1, size, size, 3), step / 255)


def _brightness(sheet: Image.Image) -> list[int]:
    """The colours of the cells, from the top."""
    column = np.asarray(sheet.convert("L"))[:, -20]
    return [int(value) for value in column[np.r_[True, np.diff(column) != 0]] if value < 200]


def test_each_step_has_its_row_and_the_result_is_marked() -> None:
    validations = [_grey(step) for step in (20, 60, 100)]
    sheet = draw_step_grid(validations, ["a photo of ohwx dog"], Result(60, 100, CHOSEN))
    assert [value for value in _brightness(sheet) if value in (20, 60, 100)] == [20, 60, 100]
    marked = _marked(sheet)
    assert sheet.height / 3 < marked.min() < marked.max() < sheet.height * 0.7
    last = _marked(draw_step_grid(validations, ["a photo of ohwx dog"], Result(100, 100, LAST)))
    assert last.min() > marked.max() - 10
    assert not _marked(draw_step_grid(validations, ["a photo of ohwx dog"], Result(70, 100, CHOSEN))).size


def test_a_table_has_a_bounded_number_of_steps_with_the_last_and_the_result() -> None:
    validations = [_grey(step, 64) for step in range(1, 101)]
    sheet = draw_step_grid(validations, ["x"], Result(38, 100, CHOSEN))
    shown = [value for value in _brightness(sheet) if value <= 100]
    assert len(shown) <= MOST_ROWS and {38, 100} <= set(shown) and shown == sorted(shown)


def test_the_table_of_a_run_has_all_steps_whichever_is_chosen(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    run = _run(tmp_path, **SHOWN)
    _read(run.events())

    def table(run: Run) -> Image.Image:
        picture = write_step_grid(run, run.validations(run.trained_steps)[0])
        assert picture is not None
        return picture

    own = table(run)
    path = run.folder.path / "validation" / "grid.png"
    assert Image.open(path).tobytes() == own.tobytes()
    written = path.stat().st_mtime_ns
    _read(run.events(use_step=2))
    chosen = table(run)
    assert chosen.height == own.height and _marked(chosen).min() < _marked(own).min()
    assert Image.open(path).tobytes() == chosen.tobytes() and path.stat().st_mtime_ns != written
    written = path.stat().st_mtime_ns
    table(run)
    assert path.stat().st_mtime_ns == written, "the same is not written again"

    def refuse(*_: Any) -> None:
        with disk_errors("it cannot be saved", path):
            raise PermissionError(13, "Permission denied")

    monkeypatch.setattr(run.writer, "write_grid", refuse)
    assert table(run).size == chosen.size, "a run that cannot be written to is shown all the same"
    assert "it cannot be saved" in caplog.text.lower()


def test_a_run_without_images_has_none(tmp_path: Path) -> None:
    run = _run(tmp_path, steps=1)
    _read(run.events())
    assert write_step_grid(run, []) is None and not run.folder.grid_path.exists()
