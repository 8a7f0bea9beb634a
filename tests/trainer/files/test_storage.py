"""What is written is on the disk before it is called written: the file, then its name, then the folder that has it."""

from __future__ import annotations

import errno
import os
import shutil
from pathlib import Path

import pytest
import torch

from subjectbooth.trainer.errors import SubjectBoothError
from subjectbooth.trainer.events import StepDone
from subjectbooth.trainer.files import storage
from subjectbooth.trainer.files.lock import lock_folder
from subjectbooth.trainer.files.storage import make_folder, write_atomic
from subjectbooth.trainer.learn.checkpoint import Checkpoint
from subjectbooth.trainer.runs.folder import RunFolder
from subjectbooth.trainer.runs.writer import FolderWriter

pytestmark = pytest.mark.skipif(os.name == "nt", reason="Windows cannot flush a folder")


@pytest.fixture
def calls(monkeypatch: pytest.MonkeyPatch) -> list[tuple[str, str]]:
    """What the disk is asked for: "flush" with the name of the file or folder, and "rename" with the new name."""
    made: list[tuple[str, str]] = []
    opened: dict[int, Path] = {}
    real_open, real_flush, real_replace = os.open, os.fsync, os.replace

    def open_(path: str | Path, *more: int, **named: int) -> int:
        handle = real_open(path, *more, **named)
        opened[handle] = Path(path)
        return handle

    def flush(handle: int) -> None:
        real_flush(handle)
        folder = opened.get(handle)
        is_folder = folder is not None and folder.is_dir() and os.path.samestat(os.fstat(handle), folder.stat())
        made.append(("flush", folder.name if folder is not None and is_folder else "file"))

    def replace(source: Path, target: Path) -> None:
        real_replace(source, target)
        made.append(("rename", target.name))

    monkeypatch.setattr(os, "open", open_)
    monkeypatch.setattr(os, "fsync", flush)
    monkeypatch.setattr(os, "replace", replace)
    return made


@pytest.mark.parametrize("content", [b"x", "текст", lambda path: path.write_bytes(b"picture")])
def test_the_file_is_flushed_then_renamed_then_its_folder_is_flushed(
    tmp_path: Path, calls: list[tuple[str, str]], content: object
) -> None:
    folder = tmp_path / "рекс 🐶"
    folder.mkdir()
    write_atomic(folder / "a.json", content)  # type: ignore[arg-type]
    assert calls == [("flush", "file"), ("rename", "a.json"), ("flush", "рекс 🐶")]


def test_a_checkpoint_put_aside_is_under_its_new_name_for_good(tmp_path: Path, calls: list[tuple[str, str]]) -> None:
    folder = RunFolder(tmp_path, "0" * 64, "ohwx dog")
    FolderWriter(folder).save_checkpoint(
        Checkpoint(8, {"unet/a": torch.zeros(4)}, {}, [{"loss": 0.5, "instance_loss": 0.5}] * 8, {})
    )
    calls.clear()
    folder.load_checkpoint(5, FolderWriter(folder).set_checkpoint_aside)
    assert calls == [("rename", "checkpoint_000008.safetensors"), ("flush", folder.path.name)]


def test_new_folders_are_flushed_into_those_above_them(tmp_path: Path, calls: list[tuple[str, str]]) -> None:
    make_folder(tmp_path / "one" / "two")
    assert calls == [("flush", tmp_path.name), ("flush", "one")]
    calls.clear()
    make_folder(tmp_path / "one" / "two")
    assert calls == []
    with lock_folder(tmp_path / "one" / "run"):
        assert calls == [("flush", "one")]


@pytest.mark.parametrize(
    ("code", "needed", "todo"),
    [
        (errno.ENOSPC, "Required: free disk space.", "Free some space; what was saved before is still there."),
        (errno.EACCES, "Required: write permission.", "Make the folder writable"),
        (errno.EROFS, "Required: write permission.", "Make the folder writable"),
        (errno.EIO, "Required: free disk space and write permission.", "Free some space"),
    ],
)
def test_each_refusal_of_the_disk_has_its_remedy(tmp_path: Path, code: int, needed: str, todo: str) -> None:
    with pytest.raises(SubjectBoothError) as caught, storage.disk_errors("it cannot be saved", tmp_path):
        raise OSError(code, os.strerror(code))
    assert needed in str(caught.value) and todo in str(caught.value)


def test_a_deleted_folder_is_no_full_disk(tmp_path: Path) -> None:
    folder = RunFolder(tmp_path, "0" * 64, "ohwx dog")
    FolderWriter(folder).open({})
    shutil.rmtree(folder.path)
    with pytest.raises(SubjectBoothError) as caught:
        FolderWriter(folder).log(StepDone(1, 3, 0.1, {"instance_loss": 0.1}, 1e-4, 1.0, 0.5, None))
    message = str(caught.value)
    assert "Required: the folder, which was deleted or moved in the meantime. Leave the folder alone" in message
    assert "space" not in message and "still there" not in message and str(folder.path) in message


@pytest.mark.parametrize("refused", [errno.EINVAL, errno.ENOTSUP, errno.EACCES])
def test_a_file_system_that_does_not_flush_folders_is_written_to_all_the_same(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, refused: int
) -> None:
    real = os.open

    def open_(path: str | Path, *more: int, **named: int) -> int:
        if Path(path).is_dir():
            raise OSError(refused, os.strerror(refused))
        return real(path, *more, **named)

    monkeypatch.setattr(os, "open", open_)
    write_atomic(tmp_path / "new" / "a.json", "x")
    assert (tmp_path / "new" / "a.json").read_text("utf-8") == "x"


def test_windows_is_asked_again_while_somebody_reads_the_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """There is no Windows here: its refusal is made."""
    path = tmp_path / "file"
    path.write_text("old")
    real, asked = os.replace, []

    def refusing(source: str, target: str) -> None:
        asked.append(source)
        if len(asked) < 3:
            raise PermissionError(13, "Access is denied")
        real(source, target)

    monkeypatch.setattr(os, "replace", refusing)
    with pytest.raises(PermissionError):
        storage.write_atomic(path, "new")
    assert (len(asked), path.read_text()) == (1, "old")
    monkeypatch.setattr(storage, "_RETRY_DELAYS", (0.05, 0.2, 1.0))
    asked.clear()
    storage.write_atomic(path, "new")
    assert (len(asked), path.read_text()) == (3, "new")
