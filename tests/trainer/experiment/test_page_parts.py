"""The parts of a grid's page: spread, charts, tables of pictures, remaining time, W&B."""

from __future__ import annotations

import re
import xml.etree.ElementTree as ET
from collections.abc import Sequence
from pathlib import Path

import pytest
from PIL import Image

from subjectbooth.trainer.experiment.curves import Curve, curves, dots
from subjectbooth.trainer.experiment.executor import Outcome, in_order
from subjectbooth.trainer.experiment.jobs import Job, Point
from subjectbooth.trainer.experiment.page import Page
from subjectbooth.trainer.experiment.progress import Progress
from subjectbooth.trainer.experiment.records import Record, Records
from subjectbooth.trainer.experiment.sheets import sheets
from subjectbooth.trainer.experiment.spec import Axis, Measuring, Spec
from subjectbooth.trainer.experiment.table import Cell, Row, as_csv, cell, collect, markdown
from subjectbooth.trainer.shell.grid_tracker import log_page


def row(labels: tuple[str, ...], seed: int, figures: dict[str, float] | None, pictures: Sequence[Path] = ()) -> Row:
    point = Point(labels, seed, 5, "job")
    record = Record("run", "key", 5, figures, (), tuple(pictures)) if figures is not None else None
    return Row(point, record, "" if record else "too | little\nmemory")


def test_mean_and_spread() -> None:
    rows = [
        row(("a|b",), 0, {"x": 1.0}),
        row(("a|b",), 1, {"x": 2.0}),
        row(("c",), 0, {"x": 7.0}),
        row(("c",), 1, None),
    ]
    found = cell(rows[:2], "x")
    assert found is not None and (found.mean, found.spread) == (1.5, pytest.approx(0.7071068))
    assert markdown(["way"], rows, ["x"]).splitlines()[2:] == [
        "| a\\|b | 1.500 ± 0.707 | 2 |",
        "| c | 7.000 | 1 of 2 |",
    ]
    assert as_csv(["way"], rows, ["x"]).splitlines()[-2:] == ['c,1,5,,,,,"too | little', 'memory"']


def test_a_band_is_one_deviation_wide_and_a_mean_is_where_its_axis_says() -> None:
    shown = [Curve("one", [(0, Cell((1.0, 3.0))), (10, Cell((5.0, 5.0)))]), Curve("<two>", [(0, Cell((0.0,)))])]
    svg = curves([("drift", shown)], "steps")
    root = ET.fromstring(svg)  # well-formed, so labels are escaped
    texts = {element.text for element in root.iter() if element.text and element.text.strip()}
    assert {"drift", "steps", "one", "<two>", "0", "10"} <= texts
    dots_at = [(float(e.get("cx", "")), float(e.get("cy", ""))) for e in root.iter() if e.tag.endswith("circle")]
    (x0, y2), (x1, y5), (_, y0) = dots_at
    assert x1 > x0 and (y0 - y2) / (y0 - y5) == pytest.approx(2 / 5, abs=0.01)
    (band,) = re.findall(r'polygon points="([^"]+)"', svg)
    ys = [float(pair.split(",")[1]) for pair in band.split()]
    assert (ys[3] - ys[0]) / (y0 - y2) == pytest.approx(2**0.5, abs=0.01)  # 2 x the deviation, in units of 2


def test_dots_say_what_failed() -> None:
    root = ET.fromstring(dots([("x", [Cell((1.0, 2.0)), None])], ["good", "bad"]))
    texts = [element.text for element in root.iter() if element.tag.endswith("text")]
    assert {"good", "bad", "failed"} <= set(texts)
    assert sum(element.tag.endswith("circle") for element in root.iter()) == 3  # two runs and their mean


def test_tables_of_pictures(tmp_path: Path) -> None:
    """One axis: a row for the base and each value, a column for each prompt; two axes: a table for each prompt."""

    def pictures(name: str, shade: int) -> list[Path]:
        paths = [tmp_path / f"{name}{number}.png" for number in range(4)]
        for number, path in enumerate(paths):
            Image.new("RGB", (8, 8), (shade, 50 * number, 0)).save(path)
        return paths

    prompts = ["p", "q"]
    one = [row(("a",), 0, {}, pictures("a", 40)), row(("b",), 0, {}, pictures("b", 90)), row(("b",), 1, {})]
    (sheet,) = sheets(["way"], one, prompts, 0)
    colours = {colour for _, colour in sheet.image.getcolors(1 << 24) or []}
    assert {(40, 0, 0), (40, 50, 0), (90, 0, 0), (90, 50, 0), (40, 100, 0), (40, 150, 0)} <= colours
    two = [row((way, rank), 0, {}, one[0].record.pictures) for way in "ab" for rank in "12"]  # type: ignore[union-attr]
    two[3] = row(("b", "2"), 0, None)
    assert [sheet.title for sheet in sheets(["way", "rank"], two, prompts, 0)] == prompts
    assert not sheets(["way"], [row(("a",), 0, None)], prompts, 0)


def test_the_remaining_time_is_that_of_what_was_timed() -> None:
    progress = Progress()
    progress.steps.left, progress.measurements.left = 1000, 10
    assert progress.remaining == ""
    progress.found(progress.steps, 400)  # was trained before
    progress.did(progress.steps, 100, 60.0)
    assert progress.remaining == "more than 5 min left"  # 500 steps at 0.6 s
    progress.did(progress.measurements, 1, 20.0)
    assert progress.remaining == "about 8 min left"
    progress.found(progress.steps, 10**6)
    progress.found(progress.measurements, 10**6)
    assert progress.remaining == ""


def test_a_failing_job_does_not_end_the_others(tmp_path: Path) -> None:
    jobs = [Job(name, name, {}, (1, 2)) for name in "abc"]

    def carry_out(job: Job, records: dict[int, str]) -> None:
        records[1] = f"{job.key} at 1"
        if job.key == "b":
            raise RuntimeError("no luck")
        records[2] = f"{job.key} at 2"

    outcomes = {outcome.job: outcome for outcome in in_order(jobs, carry_out)}
    assert outcomes["b"] == Outcome("b", {1: "b at 1"}, "RuntimeError: no luck")
    assert not outcomes["a"].problem and outcomes["c"].records[2] == "c at 2"
    records = Records(tmp_path)
    picture = Image.new("RGB", (2, 2))
    records.write("b at 1", run="r", key="k", step=1, figures={"x": 1.5}, notes=[], pictures=[picture])
    rows = collect([Point(("l",), 0, 1, "b"), Point(("l",), 0, 2, "b")], outcomes, records)
    assert rows[0].record is not None and rows[0].record.figures == {"x": 1.5}
    assert rows[1].record is None and rows[1].problem == "RuntimeError: no luck"
    rows[0].record.pictures[0].unlink()
    assert records.read("b at 1") is None  # not whole any more


def test_the_page_goes_to_wandb_offline(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("wandb")
    monkeypatch.setenv("WANDB_MODE", "offline")
    monkeypatch.setenv("WANDB_SILENT", "true")
    spec = Spec("x", "x", "", "", {}, {}, (Axis("way", {"a": {}}),), (0,), Measuring())
    rows = [row(("a",), 0, {"x": 1.0}), row(("b",), 0, None)]
    page = Page("", rows, ["x"], [], as_csv(["way"], rows, ["x"]), "")
    warnings: list[str] = []
    log_page("wandb", page, spec, tmp_path, warnings.append)
    assert not warnings
    (table,) = tmp_path.rglob("media/table/*.json")
    assert '"data":[["a",0,5,1' in table.read_text("utf-8").replace(" ", "")
