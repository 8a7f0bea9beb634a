"""The commands of the shell: the table, the old spellings, a typo, and ``inspect``."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

from subjectbooth.trainer import __main__ as shell
from subjectbooth.trainer.shell import commands, train


def test_help_lists_every_command(capsys: pytest.CaptureFixture[str]) -> None:
    assert shell.main(["--help"]) == 0
    shown = capsys.readouterr().out
    assert all(f"\n  {name} " in shown for name in commands.COMMANDS)
    assert shell.main([]) == 2


@pytest.mark.parametrize("name", commands.COMMANDS)
def test_every_command_has_help_under_its_name(name: str, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as ended:
        shell.main([name, "--help"])
    assert ended.value.code == 0
    assert capsys.readouterr().out.startswith(f"usage: python -m trainer {'train' if name == 'plan' else name} ")


@pytest.mark.parametrize(
    ("given", "plans"),
    [([], False), (["train"], False), (["--plan"], True), (["train", "--plan"], True), (["plan"], True)],
)
def test_every_spelling_of_a_training(given: list[str], plans: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    seen = []
    monkeypatch.setattr(train, "_train", lambda options, device: seen.append(options))
    assert shell.main([*given, "--base", "b", "--photos", "p", "--class-word", "dog", "--steps", "7"]) == 0
    assert [(options.steps, options.class_word, options.plan) for options in seen] == [(7, "dog", plans)]


def test_a_typo_names_the_nearest_command(capsys: pytest.CaptureFixture[str]) -> None:
    assert shell.main(["evalute", "--lora", "x"]) == 2
    shown = capsys.readouterr().err
    assert shown.startswith("There is no command 'evalute'.") and shown.endswith("Use evaluate.\n")


def test_inspect_counts_layers_and_hides_control_characters(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    tensors = {}
    for layer, rank in {"lora_unet_a": 4, "lora_unet_b": 8, "lora_te_c": 2}.items():
        tensors[f"{layer}.lora_down.weight"] = torch.ones(rank, 3)
        tensors[f"{layer}.lora_up.weight"] = torch.ones(3, rank)
        tensors[f"{layer}.alpha"] = torch.tensor(1.0)
    path = tmp_path / "rex.safetensors"
    save_file(tensors, str(path), {"subjectbooth.trigger": "ohwx dog", "note": "\x1b[2J"})
    assert shell.main(["inspect", str(path)]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert lines[1:4] == [
        "write 'ohwx dog' in prompts",
        "denoiser: 2 layers, rank 4, 8",
        "text encoder: 1 layers, rank 2",
    ]
    assert lines[-2:] == ["  note = '\\x1b[2J'", "  subjectbooth.trigger = ohwx dog"]
    assert shell.main(["inspect", str(tmp_path / "missing.safetensors")]) == 2
    assert "cannot be opened" in capsys.readouterr().err
