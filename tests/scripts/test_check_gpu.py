"""scripts/check_gpu.py itself: its table, its exit codes, and its checks on a CPU."""

from __future__ import annotations

import os
import time
from collections.abc import Callable

import pytest
import torch

from subjectbooth.scripts import check_gpu
from subjectbooth.tests.card.bench import Bench, NotHere

BENCH = Bench(torch.device("cpu"), small=True)


def _missing(bench: Bench) -> str:
    raise NotHere("needs a thing")


def _wrong(bench: Bench) -> str:
    raise AssertionError("1 in place of 2\nand more")


def test_one_that_fails_stops_no_other_and_every_line_comes_at_once() -> None:
    lines: list[str] = []
    seen: list[int] = []

    def right(bench: Bench) -> str:
        seen.append(len(lines))
        return "as it should be"

    rows = check_gpu.run({"a": right, "b": _wrong, "c": _missing, "d": right}, BENCH, NotHere, 60, lines.append)
    assert [(row.name, row.result) for row in rows] == [("a", "ok"), ("b", "FAILED"), ("c", "unavailable"), ("d", "ok")]
    assert seen == [0, 3]
    assert rows[1].figure == "AssertionError: 1 in place of 2"
    shown = check_gpu.table(rows)
    assert "2 ok, 1 FAILED, 1 unavailable, 0 not run" in shown
    assert all(any(row.name in line and row.figure in line for line in shown.splitlines()) for row in rows)


def test_what_there_is_no_time_for_is_listed(monkeypatch: pytest.MonkeyPatch) -> None:
    now = [0.0]
    monkeypatch.setattr(time, "monotonic", lambda: now[0])

    def long(bench: Bench) -> str:
        now[0] += 61
        return "done"

    rows = check_gpu.run({"a": long, "b": _wrong}, BENCH, NotHere, 60, lambda line: None)
    assert [(row.result, row.figure) for row in rows] == [("ok", "done"), ("not run", "time")]


def test_a_card_that_answers_no_more_ends_it(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(check_gpu, "_lost", lambda bench: "the card no longer answers")
    rows = check_gpu.run({"a": _wrong, "b": _missing}, BENCH, NotHere, 60, lambda line: None)
    assert [row.result for row in rows] == ["FAILED", "not run"]


def test_without_a_card_it_says_what_it_needs(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert check_gpu.main(["--only", "plan"]) == check_gpu.NO_GPU
    said = capsys.readouterr().out
    assert said.startswith("This needs an NVIDIA GPU")
    assert "plan of SDXL" in said and "xformers" not in said


@pytest.mark.parametrize(
    "words",
    [
        ["bf16", "random", "xformers", "dynamic"],
        pytest.param(
            [],
            marks=[
                pytest.mark.slow,
                pytest.mark.skipif(
                    not os.environ.get("SUBJECTBOOTH_SLOW"),
                    reason="every check that a CPU can run: set SUBJECTBOOTH_SLOW=1",
                ),
            ],
        ),
    ],
)
def test_the_checks_themselves_run(
    words: list[str],
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    torch_threads: Callable[[int], None],
) -> None:
    torch_threads(1)
    monkeypatch.delenv("COMFYUI_PATH", raising=False)
    assert check_gpu.main(["--cpu", *(["--only", *words] if words else [])]) == 0
    said = capsys.readouterr().out
    assert "0 FAILED" in said and "0 not run" in said
    assert "losses within" in said and "the CPU's as before" in said
    assert said.count("needs an NVIDIA GPU") >= 1
