"""The benchmark's sentences: a difference that is none is not printed as one, and a noisy machine is named."""

from __future__ import annotations

import argparse
import json
from pathlib import Path
from typing import Any

import pytest

from subjectbooth.benchmarks import run
from subjectbooth.benchmarks.contestants import Contestant, ContestantFailed, Places, all_contestants
from subjectbooth.benchmarks.plot import Panel, svg
from subjectbooth.benchmarks.rounds import Measured, run_all
from subjectbooth.benchmarks.scene import Scene
from subjectbooth.benchmarks.table import MARK, noise, ratio, read, report

SCENE = Scene(Path("scene"))
NOWHERE = Places(None, None, Path("scratch"))


def found(seconds: float, **more: Any) -> dict[str, Any]:
    return {
        "wall": [seconds * 0.9, seconds, seconds * 5],
        "cpu": [seconds] * 3,
        "whole": 10.0,
        "imports": 1.0,
        "first_step": 5.0,
        "last_step": 8.0,
        "parts": {"base": 2.0},
        "peak": 2**30,
        **more,
    }


def counted(kernels: int) -> dict[str, Any]:
    counts = {"flop": 2e9, "kernels": kernels, "syncs": 4, "casts": 1}
    return found(1, counts=counts, copies=1.0)


@pytest.mark.parametrize(
    ("values", "text"),
    [
        ([1.2, 1.1, 1.3], "1.20 (1.10 to 1.30)"),
        ([0.8, 0.9, 0.7], "0.80 (0.70 to 0.90)"),
        ([1.2, 0.9, 1.3], f"1.20 (0.90 to 1.30) {MARK}"),
        ([1.5], "1.50"),
        ([], "-"),
    ],
)
def test_a_range_on_both_sides_of_1_is_marked(values: list[float], text: str) -> None:
    assert ratio(values) == text


def test_a_noisy_machine_is_named() -> None:
    quiet = Measured(timed={"floor": [found(1.0), found(1.01)]}, loads=[0.5])
    assert not any("Noisy" in line for line in noise(SCENE, quiet))
    uneven = Measured(timed={"floor": [found(1.0), found(1.2)]}, loads=[0.5])
    assert any("differ by 20%" in line for line in noise(SCENE, uneven))
    loaded = Measured(timed={"floor": [found(1.0), found(1.01)]}, loads=[1000.0])
    assert any("load average was up to 1000.0" in line for line in noise(SCENE, loaded))
    once = Measured(timed={"floor": [found(1.0)]}, loads=[0.5])
    assert any("One round only" in line for line in noise(SCENE, once))


def test_ratios_are_to_the_floor_of_the_same_round() -> None:
    floor, ours = all_contestants(NOWHERE)[:2]
    measured = Measured(
        counted={"floor": counted(100), "ours": counted(120)},
        timed={"floor": [found(1.0), found(2.0)], "ours": [found(1.1), found(2.4)]},
    )
    text, figures = report(SCENE, [floor, ours], measured)
    assert (
        "| SubjectBooth, shell | 1.15 (1.10 to 1.20) | 1.15 (1.10 to 1.20) | 2.0 | 120 | 4 | 1 | 1.00 | 1.0 |" in text
    )
    assert "shell | 10.0 | 1.0 | 2.0 |  |  |  | 2.0 | 3.0 | 2.0 |" in text
    assert json.loads(figures)["rows"]["ours"]["wall"] == pytest.approx([1.1, 1.2])


def test_each_round_has_its_own_order_and_one_that_fails_stops_no_other(monkeypatch: pytest.MonkeyPatch) -> None:
    ran: list[tuple[str, bool]] = []

    def contestant(name: str) -> Contestant:
        def train(scene: Scene, places: Places, output: Path, counts: bool) -> dict[str, Any]:
            ran.append((name, counts))
            assert scene.threads == (1 if counts else 2)  # only one thread is counted
            if name == "broken":
                raise ContestantFailed("no such thing")
            return found(1)

        return Contestant(name, name, train)

    names = ["a", "b", "broken", "c", "d", "e"]
    two = Scene(Path("scene"), threads=2)
    measured = run_all(two, NOWHERE, [contestant(name) for name in names], 2, seed=1)
    assert ran[:6] == [(name, True) for name in names]
    first, second = ran[6:11], ran[11:]
    assert sorted(first) == sorted(second) == [(name, False) for name in "abcde"]
    assert first != second
    assert measured.failed == {"broken": "no such thing"}


def test_rounds_are_added_to_an_earlier_result(tmp_path: Path) -> None:
    ran: list[bool] = []

    def train(scene: Scene, places: Places, output: Path, counts: bool) -> dict[str, Any]:
        ran.append(counts)
        return counted(1) if counts else found(1)

    floor = Contestant("floor", "floor", train)
    path = tmp_path / "out.json"
    assert read(path, SCENE) is None
    for _ in range(2):
        measured = run_all(SCENE, NOWHERE, [floor], 2, 0, read(path, SCENE))
        path.write_text(report(SCENE, [floor], measured)[1], "utf-8")
    assert ran == [True, False, False, False, False]
    assert len(measured.timed["floor"]) == 4 and len(measured.loads) == 5
    with pytest.raises(SystemExit, match="other settings"):
        read(path, Scene(Path("scene"), rank=4))


def test_only_asks_for_the_floors_of_what_is_named(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    chosen: list[str] = []

    def build(scene: Scene) -> None:
        pass

    def run_nothing(
        scene: Scene, places: Places, contestants: list[Contestant], rounds: int, seed: int, earlier: Any, *_: Any
    ) -> Measured:
        chosen.extend(each.name for each in contestants)
        return earlier or Measured()

    monkeypatch.setattr("subjectbooth.benchmarks.scene.build", build)
    monkeypatch.setattr("subjectbooth.benchmarks.rounds.run_all", run_nothing)
    monkeypatch.setattr("subjectbooth.tests.comfy_server.exit_on_sigterm", lambda: None)
    given: argparse.Namespace = run.parser().parse_args(
        ["--only", "ours-class", "diffusers", "--out", str(tmp_path / "out")]
    )
    assert run.compare(given, tmp_path, tmp_path) == 0
    assert chosen == ["floor", "floor-class", "ours-class"]  # the script is not given
    figures = report(run.scene_of(given, tmp_path), all_contestants(NOWHERE), Measured({"core": counted(7)}))[1]
    given.out.with_suffix(".json").write_text(figures, "utf-8")
    given.add = True
    assert run.compare(given, tmp_path, tmp_path) == 0
    assert "ComfyUI's Train LoRA" in given.out.with_suffix(".md").read_text("utf-8")  # who is not named stays
    given.only = ["nobody"]
    with pytest.raises(SystemExit, match="contestants: floor, ours"):
        run.compare(given, tmp_path, tmp_path)


def test_a_plot_starts_at_zero_and_ends_at_the_last_value() -> None:
    panel = Panel("Rank", "rank", [4, 8], [1.0, 2.0], [0.5, 0.5], "s")
    text = svg([panel, panel, panel])
    assert text.count("<g ") == 3 and 'viewBox="0 0 600 420"' in text
    assert "150.0,102.0 254.0,34.0" in text  # half of the width and 1 of 2 s; all of both
    assert "150.0,34.0 254.0,34.0" in text  # 0.5 of 0.5 GB
