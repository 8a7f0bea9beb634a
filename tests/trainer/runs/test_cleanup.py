"""The disk is bounded: the oldest that no LoRA needs, shown before it goes, and nothing else."""

from __future__ import annotations

import json
import os
import shlex
import time
from pathlib import Path
from typing import Any

import pytest
import torch

from subjectbooth.tests.fuzzing import files_below
from subjectbooth.trainer.__main__ import main
from subjectbooth.trainer.errors import SubjectBoothError
from subjectbooth.trainer.files.lock import lock_folder
from subjectbooth.trainer.files.safetensors_file import to_bytes
from subjectbooth.trainer.preserve.priors import PriorRecipe, PriorStore
from subjectbooth.trainer.runs import cleanup
from subjectbooth.trainer.runs.cleanup import (
    choose_removable,
    format_size,
    over_limit_note,
    parse_size,
    remember_lora_folders,
    remove_items,
    survey,
)
from subjectbooth.trainer.runs.folder import RunFolder
from subjectbooth.trainer.runs.writer import FolderWriter

HOUR = 3600


def _age(folder: Path, hours: float) -> None:
    for path in folder.rglob("*"):
        os.utime(path, (time.time() - hours * HOUR,) * 2)


def _run(root: Path, number: int, hours: float, class_images: str = "", size: int = 1000) -> RunFolder:
    folder = RunFolder(root, f"{number:064d}"[::-1], f"ohwx собака {number}")
    FolderWriter(folder).open({"class_images": class_images})
    (folder.path / "checkpoint.safetensors").write_bytes(bytes(size))
    _age(folder.path, hours)
    return folder


def _store(root: Path, seed: int, hours: float) -> PriorStore:
    store = PriorStore(root, PriorRecipe("b", "a photo of a dog", "", 64, 64, "ddim", "x", 2, 7.0, seed, 0))
    store.save([0], torch.randn(1, 4, 8, 8))
    _age(store.path, hours)
    return store


def _lora(path: Path, run: RunFolder) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(to_bytes({"x": torch.zeros(2)}, {"subjectbooth.run_key": run.key}))
    return path


def test_the_oldest_that_no_lora_needs_go_and_nothing_else(tmp_path: Path) -> None:
    root, images, loras = tmp_path / "subjectbooth", tmp_path / "subjectbooth" / "class_images", tmp_path / "loras"
    kept_store, free_store = _store(images, 1, 90), _store(images, 2, 80)
    needed = _run(root, 1, 100, kept_store.path.name)
    old, older, recent = _run(root, 2, 50), _run(root, 3, 60), _run(root, 4, 0)
    lora = _lora(loras / "pets" / "rex.safetensors", needed)
    (loras / "broken.safetensors").write_bytes(b"x")
    foreign = root / "somebody_else"
    foreign.mkdir()
    (foreign / "run.json").write_text(json.dumps({"key": "0" * 64}))
    elsewhere = _run(tmp_path / "elsewhere", 5, 500)
    (root / "link_to_it").symlink_to(elsewhere.path, target_is_directory=True)

    items = survey(root, images, [loras])
    assert [item.path for item in items] == [
        needed.path,
        kept_store.path,
        free_store.path,
        older.path,
        old.path,
        recent.path,
    ]
    reasons = {item.path: item.keep_reason for item in items}
    assert reasons[needed.path] == "its LoRA exists"
    assert reasons[kept_store.path] == "a run needs them"
    assert reasons[recent.path] == "in use"
    total = sum(item.size for item in items)
    assert choose_removable(items, total) == []
    assert [item.path for item in choose_removable(items, total - 1)] == [free_store.path]
    chosen = choose_removable(items, 0)
    assert [item.path for item in chosen] == [free_store.path, older.path, old.path]

    before = files_below(tmp_path)
    gone = {path for item in chosen for path in files_below(item.path)}
    assert remove_items(chosen) == sum(item.size for item in chosen)
    assert files_below(tmp_path) == before - gone
    assert not old.path.exists()
    assert lora.is_file()
    assert elsewhere.path.is_dir()
    # Without its LoRA the run, and then its class images, are needed no more.
    lora.unlink()
    items = survey(root, images, [loras])
    assert [item.path for item in choose_removable(items, 0)] == [needed.path, kept_store.path]


def test_the_other_steps_of_a_run_that_stays_may_go(tmp_path: Path) -> None:
    """They are counted, and removed without the run: its result and what is chosen and published are still there."""
    needed, free = _run(tmp_path / "runs", 1, 50), _run(tmp_path / "runs", 2, 40)
    for run in (needed, free):
        for step in (100, 200, 300, 400, 500):
            run.lora_path(step).write_bytes(bytes(700))
        result = {"results": {"500": {"step": 400, "why": "stopped"}}, "chosen": {"500": 200}, "step": 300}
        (run.path / "result.json").write_text(json.dumps(result), "utf-8")
    _age(needed.path, 50)
    _age(free.path, 40)
    _lora(tmp_path / "loras" / "rex.safetensors", needed)
    items = survey(tmp_path / "runs", tmp_path / "none", [tmp_path / "loras"])
    assert [(item.path, item.kind, bool(item.keep_reason)) for item in items] == [
        (needed.path, "other steps", False),
        (needed.path, "run", True),
        (free.path, "run", False),
    ]
    assert items[0].size == 700 and items[1].size > 4 * 700 + 1000
    assert sum(item.size for item in items[:2]) == sum(path.stat().st_size for path in files_below(needed.path))
    assert remove_items(items[:1]) == 700
    assert needed.kept_steps() == [200, 300, 400, 500] and (needed.path / "checkpoint.safetensors").is_file()
    assert free.kept_steps() == [100, 200, 300, 400, 500]


def test_nothing_goes_while_a_lora_may_not_be_read(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Its run, which it would name, may be among the oldest. A link whose file is gone is no LoRA."""
    root, loras = tmp_path / "subjectbooth", tmp_path / "loras"
    shut = _lora(loras / "shut.safetensors", _run(root, 1, 100))
    (loras / "gone.safetensors").symlink_to(tmp_path / "nowhere")
    assert [item.keep_reason for item in survey(root, root / "class_images", [loras])] == ["its LoRA exists"]
    usual = Path.open

    def refused(path: Path, *given: Any, **named: Any) -> Any:
        if path == shut:
            raise PermissionError(13, "Permission denied")
        return usual(path, *given, **named)

    monkeypatch.setattr(Path, "open", refused)
    with pytest.raises(SubjectBoothError, match=r"cannot be opened \(Permission denied\).*shut.safetensors"):
        survey(root, root / "class_images", [loras])


def test_a_run_that_somebody_is_at_work_in_stays_with_its_class_images(tmp_path: Path) -> None:
    images = tmp_path / "class_images"
    store = _store(images, 1, 90)
    run = _run(tmp_path, 1, 90, store.path.name)
    items = survey(tmp_path, images, [])
    assert len(choose_removable(items, 0)) == 2
    with lock_folder(run.path):
        _age(run.path, 90)
        assert choose_removable(survey(tmp_path, images, []), 0) == []
        assert remove_items([item for item in items if item.kind == "run"]) == 0  # begun after it was looked at
    assert (run.path / "checkpoint.safetensors").is_file()


def test_the_command_shows_first_and_removes_with_yes(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    output = tmp_path / "out"
    old, needed = _run(output / "runs", 1, 90, size=5000), _run(output / "runs", 2, 95)
    _lora(output / "rex.safetensors", needed)
    _lora(old.path / "lora_000001.safetensors", old)  # a run's own adapters keep nothing alive
    _age(old.path, 90)
    arguments = ["clean", "--output_dir", str(output), "--limit", "2KB"]
    before = files_below(tmp_path)
    assert main(arguments) == 0
    said = capsys.readouterr().out
    assert f"{old.path.name}  remove" in said
    assert f"{needed.path.name}  keep (its LoRA exists)" in said
    assert "Nothing was removed" in said
    assert files_below(tmp_path) == before
    assert main([*arguments, "--yes"]) == 0
    assert "Removed 5." in capsys.readouterr().out
    assert not old.path.exists()
    assert needed.path.is_dir()
    assert (output / "rex.safetensors").is_file()
    assert main([*arguments, "--yes"]) == 0
    assert "Nothing to remove" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("arguments", "sentence"),
    [
        (["--limit", "much"], "The size 'much'"),
        (["--limit", "5GB", "--output_dir", "/no/such"], "Folder of runs not found"),
    ],
)
def test_mistakes_of_the_command(
    arguments: list[str],
    sentence: str,
    capsys: pytest.CaptureFixture[str],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.chdir(tmp_path)
    assert main(["clean", *arguments]) == 2
    assert sentence in capsys.readouterr().err


def test_runs_of_comfyui_need_to_be_told_where_its_loras_are(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    _run(tmp_path, 1, 90)
    assert main(["clean", "--output_dir", str(tmp_path), "--yes", "--limit", "0"]) == 2
    assert "LoRA folder not found" in capsys.readouterr().err


def test_loras_on_another_drive_keep_their_runs(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """As ComfyUI has them by extra_model_paths.yaml; without the drive nothing is taken for nobody's."""
    output, drive = tmp_path / "out", tmp_path / "drive Ы" / "loras"
    needed = _run(output / "runs", 1, 90)
    _lora(drive / "rex.safetensors", needed)
    remember_lora_folders(output, [drive, tmp_path / "listed but never made"])
    arguments = ["clean", "--output_dir", str(output), "--yes", "--limit", "0"]
    assert main(arguments) == 0
    assert str(drive) in capsys.readouterr().out
    drive.rename(tmp_path / "unplugged")
    assert main(arguments) == 2
    assert f"LoRA folder not found: {drive}" in capsys.readouterr().err
    assert needed.path.is_dir()
    assert main([*arguments, "--loras", str(output)]) == 0
    assert not needed.path.exists()


def test_sizes() -> None:
    assert [parse_size(text) for text in ("5GB", "1.5 mb", "12", "3k", "0")] == [5 * 10**9, 1_500_000, 12, 3000, 0]
    assert [format_size(size) for size in (0, 999, 1500, 2.5e9)] == ["0 B", "999 B", "1.5 KB", "2.5 GB"]
    with pytest.raises(SubjectBoothError):
        parse_size("-5GB")


def test_it_is_said_when_the_disk_fills(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    _run(tmp_path, 1, 0, size=5000)
    assert over_limit_note(tmp_path) == ""
    monkeypatch.setenv(cleanup.LIMIT_VARIABLE, "4KB")
    assert "(limit 4.0 KB)" in over_limit_note(tmp_path)
    command = f'python -m trainer clean --limit 4.0KB --output_dir "{tmp_path}"'
    assert command in over_limit_note(tmp_path)
    (tmp_path / "loras").mkdir()
    remember_lora_folders(tmp_path, [tmp_path / "loras"])
    assert main(shlex.split(command)[3:]) == 0
    monkeypatch.setenv(cleanup.LIMIT_VARIABLE, "lots")
    assert over_limit_note(tmp_path) == ""


@pytest.mark.skipif(os.name == "nt", reason="links need a right there")
def test_loras_behind_links_keep_their_runs(tmp_path: Path) -> None:
    """ComfyUI lists what lies in linked folders, and what is linked itself."""
    root, loras, elsewhere = tmp_path / "subjectbooth", tmp_path / "loras", tmp_path / "another drive"
    by_folder, by_link, nobodys = _run(root, 1, 30), _run(root, 2, 20), _run(root, 3, 10)
    _lora(elsewhere / "rex.safetensors", by_folder)
    loras.mkdir()
    (loras / "pets").symlink_to(elsewhere, target_is_directory=True)
    (elsewhere / "loop").symlink_to(elsewhere, target_is_directory=True)
    adapter = _lora(by_link.path / "lora_000004.safetensors", by_link)
    _age(by_link.path, 20)
    (loras / "linked.safetensors").symlink_to(adapter)
    chosen = choose_removable(survey(root, root / "class_images", [loras]), 0)
    assert [item.path for item in chosen] == [nobodys.path]
