"""A run's folder: a longer run's checkpoint is not lost to a shorter one, and what the disk refuses is a sentence."""

from __future__ import annotations

import errno
import json
import logging
import os
import shutil
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch

from subjectbooth.tests.fuzzing import files_below, is_clean
from subjectbooth.trainer.config import TrainConfig, run_key
from subjectbooth.trainer.errors import SubjectBoothError
from subjectbooth.trainer.events import StepDone
from subjectbooth.trainer.files.safetensors_file import Serialized
from subjectbooth.trainer.files.storage import TEMP_PREFIX, write_atomic
from subjectbooth.trainer.learn.checkpoint import Checkpoint
from subjectbooth.trainer.runs.folder import RunFolder
from subjectbooth.trainer.runs.publish import publish
from subjectbooth.trainer.runs.writer import FolderWriter


def _folder(root: Path) -> RunFolder:
    return RunFolder(root, "0" * 64, "ohwx dog")


def _checkpoint(step: int) -> Checkpoint:
    losses = [{"loss": 0.5 / number, "instance_loss": 0.25} for number in range(1, step + 1)]
    return Checkpoint(step, {"unet/a": torch.full((4, 4), float(step))}, {}, losses, {"precision": "fp32"})


def test_a_shorter_run_leaves_a_longer_ones_checkpoint(tmp_path: Path) -> None:
    folder = _folder(tmp_path)
    assert folder.resumable_step(12) == 0
    FolderWriter(folder).save_checkpoint(_checkpoint(8))
    assert [folder.resumable_step(steps) for steps in (5, 8, 12)] == [0, 8, 8]
    assert folder.load_checkpoint(5, FolderWriter(folder).set_checkpoint_aside) is None
    FolderWriter(folder).save_checkpoint(_checkpoint(5))
    assert [folder.resumable_step(steps) for steps in (4, 5, 7, 8, 12)] == [0, 5, 5, 8, 8]
    assert folder.load_checkpoint(5, FolderWriter(folder).set_checkpoint_aside).step == 5
    assert folder.load_checkpoint(7).step == 5
    longest = folder.load_checkpoint(12)
    assert longest.step == 8
    assert torch.equal(longest.adapter["unet/a"], torch.full((4, 4), 8.0))
    # The log, which the shorter run has cut, gets the longer one's losses back.
    FolderWriter(folder).truncate_events(5, _checkpoint(5).losses)
    FolderWriter(folder).truncate_events(8, longest.losses)
    assert folder.losses(12) == [0.5 / number for number in range(1, 9)]
    FolderWriter(folder).discard_progress()
    assert folder.load_checkpoint(12) is None and folder.resumable_step(12) == 0


def test_a_damaged_checkpoint_put_aside_is_passed_over(tmp_path: Path) -> None:
    folder = _folder(tmp_path)
    FolderWriter(folder).save_checkpoint(_checkpoint(8))
    folder.load_checkpoint(5, FolderWriter(folder).set_checkpoint_aside)
    FolderWriter(folder).save_checkpoint(_checkpoint(5))
    aside = tmp_path / folder.path.name / "checkpoint_000008.safetensors"
    content = bytearray(aside.read_bytes())
    content[-3] ^= 1
    aside.write_bytes(bytes(content))
    assert folder.load_checkpoint(12).step == 5
    assert any("checkpoint_000008.safetensors cannot be used" in note for note in folder.notes)


def test_lines_that_a_power_cut_took_from_the_log_come_back(tmp_path: Path) -> None:
    folder = _folder(tmp_path)
    FolderWriter(folder).open({})
    for step in (1, 2, 5):
        FolderWriter(folder).log(StepDone(step, 9, 0.5 / step, {"instance_loss": 0.25}, 1e-4, 1.0, 0.5, None))
    with (folder.path / "events.jsonl").open("ab") as log:
        log.write('{"event": "StepDone", "note": "соба'.encode()[:-1])  # cut in the middle of a letter
    FolderWriter(folder).truncate_events(4, _checkpoint(4).losses)
    assert folder.losses(9) == [0.5, 0.25, 0.5 / 3, 0.125]
    lines = (folder.path / "events.jsonl").read_text("utf-8").splitlines()
    assert [json.loads(line)["step"] for line in lines] == [1, 2, 3, 4]


def test_the_words_are_part_of_the_key_even_where_no_caption_holds_them() -> None:
    """They are in the file's metadata, so a run found again under other words would tell the wrong ones."""
    config = TrainConfig()
    assert run_key(config, "s", "b", None, "ohwx dog") != run_key(config, "s", "b", None, "ohwx cat")


def _whole_file(tensors: dict[str, torch.Tensor], metadata: dict[str, str]) -> bytes:
    return b"".join(Serialized.of(tensors).parts_with_checksum(metadata))


def _actions(folder: RunFolder, lora: Path, target: Path) -> dict[str, object]:
    step = StepDone(1, 9, 0.5, {"instance_loss": 0.25}, 1e-4, 1.0, 0.5, None)
    return {
        "open": lambda: FolderWriter(folder).open({}),
        "checkpoint": lambda: FolderWriter(folder).save_checkpoint(_checkpoint(1)),
        "adapter": lambda: FolderWriter(folder).write_lora(1, Serialized.of({"a": torch.zeros(4)}), {}),
        "log": lambda: FolderWriter(folder).log(step),
        "cut log": lambda: FolderWriter(folder).truncate_events(1),
        "result": lambda: FolderWriter(folder).record_published({"lora": "x"}),
        "publish": lambda: publish(lora, target, "рекс 🐶"),
    }


@pytest.mark.parametrize("action", ["open", "checkpoint", "adapter", "publish", "cut log", "result"])
def test_a_full_disk_is_a_sentence_and_what_was_there_stays(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, action: str
) -> None:
    """A stub for the disk: flushing to it fails as it does when nothing is left."""
    folder = _folder(tmp_path / "runs")
    lora = tmp_path / "lora.safetensors"
    lora.write_bytes(_whole_file({"a": torch.zeros(4)}, {"subjectbooth.run_key": "k"}))
    actions = _actions(folder, lora, tmp_path / "loras")
    for do in actions.values():
        do()  # type: ignore[operator]
    lora.write_bytes(_whole_file({"a": torch.ones(4)}, {"subjectbooth.run_key": "k"}))
    before = {path: path.read_bytes() for path in files_below(tmp_path)}

    def full(_handle: int) -> None:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(SubjectBoothError, match="No space left") as failure:
        actions[action]()  # type: ignore[operator]
    assert is_clean(str(failure.value))
    assert {path: path.read_bytes() for path in files_below(tmp_path)} == before


@pytest.fixture
def small_disk(tmp_path: Path) -> Iterator[Path]:
    """A file system of its own with 1 MB of room."""
    disk = tmp_path / "диск 🐶"
    disk.mkdir()
    mount = shutil.which("mount") if sys.platform == "linux" and os.geteuid() == 0 else None
    command = [mount or "false", "-t", "tmpfs", "-o", "size=1m", "tmpfs", str(disk)]
    if subprocess.run(command, capture_output=True).returncode:
        pytest.skip("needs the right to mount a small disk (root on Linux)")
    try:
        yield disk
    finally:
        subprocess.run(["umount", "-l", str(disk)], check=True)


def test_a_disk_that_is_really_full_and_another_than_the_usual_one(small_disk: Path) -> None:
    """On a file system of its own nothing can be renamed over from another one."""
    folder = _folder(small_disk)
    FolderWriter(folder).open({"trigger": "ohwx собака"})
    FolderWriter(folder).save_checkpoint(_checkpoint(3))
    big = Checkpoint(4, {"unet/a": torch.zeros(1 << 20)}, {}, [{"loss": 0.5, "instance_loss": 0.25}] * 4, {})
    with pytest.raises(SubjectBoothError, match=r"The checkpoint cannot be saved \(No space left on device\)"):
        FolderWriter(folder).save_checkpoint(big)
    assert folder.load_checkpoint(9).step == 3
    assert not list(folder.path.glob(f"{TEMP_PREFIX}*"))
    lora = small_disk.parent / "lora.safetensors"
    lora.write_bytes(_whole_file({"a": torch.zeros(9)}, {"subjectbooth.run_key": "k"}))
    assert publish(lora, small_disk, "рекс").path.is_file()
    lora.write_bytes(_whole_file({"a": torch.zeros(1 << 20)}, {"subjectbooth.run_key": "k"}))
    whole = (small_disk / "рекс.safetensors").read_bytes()
    with pytest.raises(SubjectBoothError, match="The LoRA cannot be written"):
        publish(lora, small_disk, "рекс")
    assert (small_disk / "рекс.safetensors").read_bytes() == whole


def test_half_written_files_of_a_killed_program_go_when_the_run_is_taken_up(tmp_path: Path) -> None:
    folder = _folder(tmp_path)
    FolderWriter(folder).open({})
    left = folder.path / f"{TEMP_PREFIX}abc.part"
    left.write_bytes(b"half")
    foreign = folder.path / ".notes"
    foreign.write_bytes(b"somebody's")
    FolderWriter(folder).open({})
    assert not left.exists()
    assert foreign.exists()


def test_what_is_being_written_shows_in_no_list_of_loras(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    seen: list[Path] = []
    replace = os.replace
    monkeypatch.setattr(os, "replace", lambda a, b: (seen.append(Path(a)), replace(a, b))[1])
    write_atomic(tmp_path / "rex.safetensors", b"x")
    assert seen[0].parent == tmp_path
    assert seen[0].suffix == ".part"
    assert files_below(tmp_path) == {tmp_path / "rex.safetensors"}


def test_a_failing_disk_does_not_hide_what_ended_the_run(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    """A cancel must end as a cancel in ComfyUI, also when its last checkpoint cannot be saved."""
    from subjectbooth.trainer.runs.run import Run

    class Cut:
        is_built, step = True, 3

    run = object.__new__(Run)
    run.folder, run._config = _folder(tmp_path), TrainConfig()

    def refuse(*_: object, **__: object) -> None:
        raise SubjectBoothError("the disk is full", "room", "free some")

    monkeypatch.setattr(run, "_save_lora", refuse)
    with caplog.at_level(logging.ERROR):
        run._save_last(Cut(), 0.0, has_checkpoint=False)  # type: ignore[arg-type]
    assert "the steps since the last checkpoint are lost: The disk is full" in caplog.text


def test_what_cannot_be_read_now_is_not_made_anew(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """It may be whole: a scanner or a network drive that is away would cost the whole run."""
    folder = RunFolder(tmp_path, "1" * 64, "ohwx dog")
    FolderWriter(folder).open({})
    FolderWriter(folder).save_checkpoint(Checkpoint(4, {"x": torch.ones(2)}, {}, [{"loss": 1.0}] * 4, {}))
    FolderWriter(folder).write_lora(4, Serialized.of({"x": torch.ones(2)}), {"subjectbooth.run_key": folder.key})

    def refuse(_path: Path) -> bytes:
        raise PermissionError(13, "held by a scanner")

    with monkeypatch.context() as held:
        held.setattr(Path, "read_bytes", refuse)
        with pytest.raises(SubjectBoothError, match="The checkpoint cannot be read"):
            folder.load_checkpoint(10)
        with pytest.raises(SubjectBoothError, match="The adapter cannot be read"):
            folder.finished_lora(4)
    found = folder.load_checkpoint(10)
    assert found is not None and found.step == 4
    assert folder.finished_lora(4) == folder.lora_path(4) and not folder.notes
