"""The speed command: what it measures, what it says of what it cannot, and what it writes."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch

from subjectbooth.tests.layout_pair import NARROW, write_pair
from subjectbooth.trainer.base.sd import families
from subjectbooth.trainer.config import TrainConfig
from subjectbooth.trainer.learn.loop import Training
from subjectbooth.trainer.shell import speed
from subjectbooth.trainer.shell.commands import run


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_pair(tmp_path_factory.mktemp("speed"), "SD 1.x")[0]


def test_every_setting_is_measured_or_has_its_reason(
    base: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(families, "FAMILIES", tuple(NARROW.values()))
    configs: list[TrainConfig] = []

    class Recorded(Training):
        def __init__(self, *args: object, **keywords: object) -> None:
            configs.append(args[2])  # type: ignore[arg-type]
            super().__init__(*args, **keywords)  # type: ignore[arg-type]

    monkeypatch.setattr(speed, "Training", Recorded)
    monkeypatch.setattr(speed, "rows_for", lambda *args: [row for row in rows_for(*args) if "compile" not in row.name])
    out = tmp_path / "out"
    arguments = ["speed", "--base", str(base), "--resolution", "64", "--rank", "2", "--minutes", "0.01", "--cpu"]
    assert run([*arguments, "--output_dir", str(out)]) == 0
    found = json.loads((out / "speed.json").read_text("utf-8"))
    rows = {row["name"]: row for row in found["rows"]}
    assert (found["family"], found["resolution"], found["rank"]) == ("SD 1.x", 64, 2)
    for name in ("fp32", "fp32, gradient checkpointing"):
        assert len(rows[name]["seconds"]) >= speed.FEWEST and not rows[name]["reason"]
        assert rows[name]["median"] == sorted(rows[name]["seconds"])[len(rows[name]["seconds"]) // 2]
        assert rows[name]["is_planned"]
    assert rows["fp32, gradient checkpointing"]["memory"] < rows["fp32"]["memory"]
    for name, reason in {
        "fp16": "half precision",
        "bf16": "half precision",
        "fp32, xformers": "NVIDIA GPU",
        "fp32, 8-bit AdamW": "",
    }.items():
        assert not rows[name]["seconds"] and rows[name]["reason"] and reason in rows[name]["reason"]
    assert [config.gradient_checkpointing for config in configs] == ["off", "on"]
    assert all(config.precision == "fp32" and config.resolution == 64 for config in configs)
    table = (out / "speed.md").read_text("utf-8")
    assert table in capsys.readouterr().out
    assert f"| fp32 | {rows['fp32']['median']:.4g} |" in table and "not measured: " in table


rows_for = speed.rows_for


def test_a_card_measures_the_precision_it_would_choose(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_bf16_supported", lambda including_emulation: True)
    rows = rows_for(TrainConfig(), torch.device("cuda"))
    assert not any(row.reason for row in rows if row.settings.keys() <= {"precision", "gradient_checkpointing"})
    assert [row.name for row in rows[:6]] == [
        *("fp32", "fp16", "bf16", "bf16, xformers", "bf16, 8-bit AdamW", "bf16, gradient checkpointing")
    ]


@pytest.mark.parametrize(
    ("arguments", "said"),
    [(["--minutes", "0"], "minutes 0"), (["--resolution", "63"], "resolution 63"), (["--rank", "0"], "rank 0")],
)
def test_bad_options_are_rejected(
    arguments: list[str], said: str, base: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert run(["speed", "--base", str(base), "--cpu", "--output_dir", str(tmp_path), *arguments]) == 2
    assert said in capsys.readouterr().err


def test_the_table_tells_the_middle_and_the_spread() -> None:
    row = speed.Row("fp32", {}, [5.0, 1.0, 2.0, 3.0, 4.0, 9.0, 2.5, 3.5], 2_000_000_000)
    slow = speed.Row("slow", {}, [6.5], 3_000_000_000)
    about = {name: "x" for name in ("family", "base", "resolution", "rank", "batch", "device", "torch", "date")}
    lines = speed.markdown([row, slow, speed.Row("other", {}, reason="no card")], about).splitlines()[-3:]
    assert lines[0] == "| fp32 | 3.25 | 2.5 to 4 | 1.00 | 2.00 | 8 |"
    assert lines[1] == "| slow | 6.5 | 6.5 to 6.5 | 0.50 | 3.00 | 1 |"
    assert lines[2].startswith("| other | not measured: no card |")
