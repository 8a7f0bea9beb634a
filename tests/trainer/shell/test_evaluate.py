"""``python -m trainer evaluate`` on a small base from a file, with a small CLIP."""

from __future__ import annotations

import json
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

from subjectbooth.tests.layout_pair import NARROW, write_pair
from subjectbooth.tests.small_base import write_cat_photos
from subjectbooth.tests.trainer.measure.test_embedding import clip, saved
from subjectbooth.trainer import __main__ as shell
from subjectbooth.trainer.base.sd import families
from subjectbooth.trainer.base.stored.stored_base import load_base
from subjectbooth.trainer.errors import SubjectBoothError
from subjectbooth.trainer.shell import evaluate

METADATA = {
    "subjectbooth.class_word": "cat",
    "subjectbooth.token": "hta",
    "subjectbooth.trigger": "hta cat",
}


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A base, a CLIP, photos, prompts, and two LoRAs: one that changes much, and one that changes nothing."""
    folder = tmp_path_factory.mktemp("evaluate")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(families, "FAMILIES", tuple(NARROW.values()))
        denoiser = load_base(write_pair(folder, "SD 1.x")[0]).denoiser
    saved(folder / "clip", clip)
    write_cat_photos(folder / "photos")
    (folder / "prompts.txt").write_text("a photo of a clock\n\na photo of a boat\n", "utf-8")
    outline = denoiser.outline()
    assert outline is not None
    generator = torch.Generator().manual_seed(0)
    for name, strength in {"strong": 2.0, "nothing": 0.0}.items():
        tensors = {}
        for layer, module in denoiser.adapter_layers(outline, "attention").items():
            key = denoiser.file_key(layer)
            n_out, n_in = module.weight.shape
            tensors[f"{key}.lora_down.weight"] = torch.randn(2, n_in, generator=generator)
            tensors[f"{key}.lora_up.weight"] = strength * torch.randn(n_out, 2, generator=generator)
            tensors[f"{key}.alpha"] = torch.tensor(2.0)
        save_file(tensors, str(folder / f"{name}.safetensors"), METADATA)
    return folder


@pytest.fixture
def run(folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Callable[..., int]:
    """Runs the command with options that may be replaced; None leaves one out."""
    monkeypatch.setattr(families, "FAMILIES", tuple(NARROW.values()))

    def run(**changes: str | None) -> int:
        options: dict[str, str | None] = {
            "base": str(folder / "single.safetensors"),
            "lora": str(folder / "strong.safetensors"),
            "embedder": str(folder / "clip"),
            "photos": str(folder / "photos"),
            "prompts": str(folder / "prompts.txt"),
            "seeds": "2",
            "steps": "1",
            "resolution": "64",
            "output_dir": str(tmp_path / "report"),
            **changes,
        }
        given = [part for name, value in options.items() if value is not None for part in (f"--{name}", value)]
        return shell.main(["evaluate", *given, "--cpu"])

    return run


def test_the_report(run: Callable[..., int], tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Class word and trigger come from the LoRA; the table is printed as it is saved."""
    assert run() == 0
    report = tmp_path / "report"
    assert {path.name for path in report.iterdir()} == {"report.md", "figures.json", "figures.csv", "grid.png"}
    stored = json.loads((report / "figures.json").read_text("utf-8"))
    assert stored["prompts"]["class"][0] == "a photo of a cat"
    assert stored["prompts"]["subject"] == ["a photo of hta cat"]
    assert stored["prompts"]["others"] == ["a photo of a clock", "a photo of a boat"]
    assert stored["seeds"] == [0, 1] and stored["embedder"] == "CLIP clip" and not stored["notes"]
    assert stored["figures"]["drift_class"]["value"] > 0.01
    assert set(stored["figures"]) >= {"drift_others", "subject", "pres", "div", "class_after", "scenes_right"}
    printed = capsys.readouterr().out
    table = (report / "report.md").read_text("utf-8").split("\n\n")[0]
    assert table in printed and "| drift_others |" in table


def test_a_lora_that_changes_nothing_has_no_drift(run: Callable[..., int], tmp_path: Path, folder: Path) -> None:
    assert run(lora=str(folder / "nothing.safetensors"), photos=None, class_word="dog", token="shs") == 0
    stored = json.loads((tmp_path / "report" / "figures.json").read_text("utf-8"))
    assert stored["figures"]["drift_class"]["per_seed"] == pytest.approx([0, 0], abs=1e-5)
    assert stored["figures"]["drift_others"]["per_seed"] == pytest.approx([0, 0], abs=1e-5)
    assert stored["prompts"]["subject"] == ["a photo of shs dog"]
    assert "subject" not in stored["figures"]


@pytest.mark.parametrize(
    ("changes", "problem"),
    [
        ({"seeds": "1"}, "seeds 1. Required: a number from 2"),
        ({"steps": "0"}, "steps 0."),
        ({"guidance_scale": "0.5"}, "guidance_scale 0.5."),
        ({"resolution": "65"}, "65"),
        ({"lora": "missing.safetensors"}, "cannot be opened"),
        ({"embedder": "missing"}, "The folder of the embedder does not exist"),
        ({"photos": "missing"}, "cannot be read"),
        ({"prompts": "missing.txt"}, "The prompts cannot be read"),
        ({"class_word": "(cat:2)"}, "class_word"),
        ({"base": "missing.safetensors"}, "missing.safetensors"),
    ],
)
def test_what_cannot_be_used_is_reported(
    run: Callable[..., int],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    changes: dict[str, str],
    problem: str,
) -> None:
    def draws(*_: object) -> None:
        raise AssertionError("something was drawn")

    monkeypatch.setattr(evaluate.Drawer, "__call__", draws)
    monkeypatch.chdir(tmp_path)
    assert run(**changes) == 2
    assert problem in capsys.readouterr().err
    assert not list(tmp_path.rglob("*.json"))


def test_the_class_word_is_asked_for(
    run: Callable[..., int], folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    import safetensors.torch

    save_file(safetensors.torch.load_file(folder / "strong.safetensors"), str(tmp_path / "other.safetensors"))
    assert run(lora=str(tmp_path / "other.safetensors")) == 2
    assert "Add --class_word" in capsys.readouterr().err


def test_stopping_writes_nothing(
    run: Callable[..., int], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def stop(*_: object) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(evaluate.Drawer, "__call__", stop)
    assert run() == 130
    assert "nothing was written" in capsys.readouterr().err and not list((tmp_path / "report").iterdir())


def test_the_judge_of_the_demo_base_is_only_in_a_clone(monkeypatch: pytest.MonkeyPatch) -> None:
    setup = evaluate.demo_setup()
    assert setup.embedder.name == "the demo base's judge"
    assert (len(setup.others), setup.resolution, setup.steps, setup.guidance_scale) == (24, 64, 15, 2.0)
    # Python's own mark for a module that does not exist.
    monkeypatch.setitem(sys.modules, "subjectbooth.demo.making.judge", None)
    with pytest.raises(SubjectBoothError, match="a clone of the repository"):
        evaluate.demo_setup()
