"""The list of runs comes from their folders alone, opens nothing large, and deletes a run and nothing else."""

from __future__ import annotations

import builtins
import io
import json
import os
from pathlib import Path
from typing import Any

import pytest
import torch
from PIL import Image

from subjectbooth.tests.fuzzing import files_below
from subjectbooth.trainer.errors import SubjectBoothError
from subjectbooth.trainer.files.lock import lock_folder
from subjectbooth.trainer.files.safetensors_file import Serialized, to_bytes
from subjectbooth.trainer.runs.folder import RunFolder
from subjectbooth.trainer.runs.gallery import delete_run, list_runs, summarise
from subjectbooth.trainer.runs.result import BEST, CHOSEN, STOPPED, Result
from subjectbooth.trainer.runs.writer import FolderWriter

CONFIG = {
    "steps": 300,
    "resolution": 512,
    "rank": 16,
    "learning_rate": 1e-4,
    "validation_prompts": ["a photo of {subject}"],
}


def _run(root: Path, number: int, changed: int, steps: tuple[int, ...] = (100, 200, 300), **more: Any) -> RunFolder:
    folder = RunFolder(root, f"{number:064x}"[::-1], "ohwx собака")
    writer = FolderWriter(folder)
    writer.open({"config": CONFIG, "trigger": "ohwx собака", "base": "sd_v1", **more})
    for step in steps:
        metadata = {"ss_base_model_version": "sdxl_base_v1-0", "subjectbooth.run_key": folder.key}
        writer.write_lora(step, Serialized.of({"lora_unet_x.alpha": torch.ones(())}), metadata)
        picture = folder.path / "validation" / f"step_{step:06d}_00.png"
        picture.parent.mkdir(exist_ok=True)
        Image.new("RGB", (8, 8), (step % 256, 0, 0)).save(picture)
    for path in folder.path.rglob("*"):
        os.utime(path, (changed, changed))
    return folder


def test_what_a_run_says_of_itself(tmp_path: Path) -> None:
    done = _run(tmp_path, 1, 1000, preservation="curvature")
    FolderWriter(done).write_result(Result(200, 300, BEST))
    FolderWriter(done).record_published({"lora": "rex.safetensors"})
    os.utime(done.path / "result.json", (3000, 3000))
    stopped = _run(tmp_path, 2, 2000, steps=(100, 150))
    FolderWriter(stopped).write_result(Result(150, 300, STOPPED))
    os.utime(stopped.path / "result.json", (2000, 2000))
    (stopped.path / "validation" / "step_000150_00.png").unlink()
    cancelled = _run(tmp_path, 3, 1500, steps=(100,), base="")
    first, second, third = list_runs(tmp_path)
    assert [run.folder for run in (first, second, third)] == [done.path, stopped.path, cancelled.path]
    assert (first.step, first.steps, first.why, first.saved) == (200, 300, BEST, (100, 200, 300))
    assert (first.trigger, first.base, first.resolution, first.rank) == ("ohwx собака", "sd_v1", 512, 16)
    assert [(run.learning_rate, run.preservation) for run in (first, third)] == [(1e-4, "curvature"), (1e-4, "")]
    assert first.published == {"lora": "rex.safetensors"} and first.changed == 3000 and first.pictures == 3
    assert first.thumbnail == done.path / "validation" / "step_000200_00.png"
    assert first.size == sum(path.stat().st_size for path in files_below(done.path))
    assert (second.step, second.why) == (150, STOPPED)
    assert second.thumbnail == stopped.path / "validation" / "step_000100_00.png", "the latest before its step"
    assert (third.step, third.why, third.base) == (100, "unfinished", "sdxl_base_v1-0"), "of a version without base"
    FolderWriter(done).choose_step(300, 100)
    chosen = summarise(done.path)
    assert chosen is not None and (chosen.step, chosen.why) == (100, CHOSEN)


def test_only_runs_are_listed_and_damage_is_skipped(tmp_path: Path) -> None:
    run = _run(tmp_path, 1, 1000)
    bare = _run(tmp_path, 2, 900, steps=())
    (bare.path / "result.json").write_text("{")
    os.utime(bare.path / "result.json", (900, 900))
    (tmp_path / "class_images").mkdir()
    stranger = tmp_path / "ohwx_dog_000000000000"
    stranger.mkdir()
    (stranger / "run.json").write_text(json.dumps({"key": "1" * 64}))
    (tmp_path / "broken_000000000001").mkdir()
    (tmp_path / "broken_000000000001" / "run.json").write_bytes(b"[" * 100_000)
    (tmp_path / "link").symlink_to(run.path)
    assert [found.folder for found in list_runs(tmp_path)] == [run.path, bare.path]
    found = summarise(bare.path)
    assert found is not None and (found.step, found.why, found.thumbnail) == (0, "unfinished", None)
    assert list_runs(tmp_path / "nothing") == []


def test_two_hundred_runs_open_two_small_files_each(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    runs = [_run(tmp_path, number, 1000, steps=(100,)) for number in range(1, 21)]
    for run in runs:
        FolderWriter(run).write_result(Result(100, 300, STOPPED))
        (run.path / "events.jsonl").write_text("x")
        (run.path / "checkpoint.safetensors").write_text("x")
    opened: list[str] = []
    real = io.open

    def spy(file: Any, *given: Any, **named: Any) -> Any:
        opened.append(Path(file).name if isinstance(file, (str, Path)) else "")
        return real(file, *given, **named)

    monkeypatch.setattr(io, "open", spy)
    monkeypatch.setattr(builtins, "open", spy)
    assert len(list_runs(tmp_path)) == len(runs)
    assert sorted(opened) == ["result.json"] * len(runs) + ["run.json"] * len(runs)


def test_a_run_is_deleted_and_nothing_else(tmp_path: Path) -> None:
    run, other = _run(tmp_path, 1, 1000), _run(tmp_path, 2, 1000)
    (tmp_path / "class_images").mkdir()
    outside = tmp_path.parent / f"{tmp_path.name}_outside"
    outside.mkdir()
    (outside / "kept.txt").write_text("kept")
    (run.path / "validation" / "link").symlink_to(outside)
    size = sum(path.stat().st_size for path in files_below(run.path) if not path.is_relative_to(outside))
    with lock_folder(run.path), pytest.raises(SubjectBoothError, match="is in training"):
        delete_run(run.path)
    assert summarise(run.path) is not None
    freed = delete_run(run.path)
    assert freed >= size > 0 and not run.path.exists()
    assert other.path.is_dir() and (outside / "kept.txt").is_file() and (tmp_path / "class_images").is_dir()


def test_what_is_no_run_is_not_deleted(tmp_path: Path) -> None:
    run = _run(tmp_path, 1, 1000)
    (tmp_path / "class_images").mkdir()
    link = tmp_path / "link" / run.path.name
    link.parent.mkdir()
    link.symlink_to(run.path)
    for path in (tmp_path / "class_images", tmp_path, tmp_path / "nothing", link):
        with pytest.raises(SubjectBoothError, match="is not a run"):
            delete_run(path)
    assert run.path.is_dir()


def test_a_damaged_lora_names_no_base(tmp_path: Path) -> None:
    run = _run(tmp_path, 1, 1000, base="")
    run.lora_path(300).write_bytes(b"nothing")
    found = summarise(run.path)
    assert found is not None and found.base == ""
    run.lora_path(300).write_bytes(to_bytes({"x": torch.ones(())}, {"modelspec.architecture": "flux-1-dev/lora"}))
    found = summarise(run.path)
    assert found is not None and found.base == "flux-1-dev"
