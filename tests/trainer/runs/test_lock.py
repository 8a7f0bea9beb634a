"""One run, one owner."""

from __future__ import annotations

import errno
import os
import signal
import subprocess
import sys
import types
from pathlib import Path

import pytest
import torch

from subjectbooth.tests.small_base import small_base, small_class_images, small_subject
from subjectbooth.trainer.config import TrainConfig
from subjectbooth.trainer.errors import SubjectBoothError
from subjectbooth.trainer.events import Finished, StepDone
from subjectbooth.trainer.files.lock import lock_folder
from subjectbooth.trainer.runs.run import Run

ROOT = Path(__file__).resolve().parents[3]
HOLDER = """
import sys, time, types
from pathlib import Path
package = types.ModuleType("subjectbooth")
package.__path__ = [sys.argv[1]]
sys.modules["subjectbooth"] = package
from subjectbooth.trainer.files.lock import lock_folder
with lock_folder(Path(sys.argv[2])):
    print("held", flush=True)
    time.sleep(60)
"""


def _hold(folder: Path) -> subprocess.Popen[str]:
    holder = subprocess.Popen([sys.executable, "-c", HOLDER, str(ROOT), str(folder)], stdout=subprocess.PIPE, text=True)
    assert holder.stdout is not None
    assert holder.stdout.readline() == "held\n"
    return holder


def test_a_second_owner_is_told_and_a_killed_one_leaves_nothing(tmp_path: Path) -> None:
    folder = tmp_path / "пробег 🐱"
    holder = _hold(folder)
    try:
        with pytest.raises(SubjectBoothError, match="one program per run"), lock_folder(folder):
            pass
    finally:
        os.kill(holder.pid, signal.SIGTERM if os.name == "nt" else signal.SIGKILL)
        holder.wait()
        assert holder.stdout is not None
        holder.stdout.close()
    with lock_folder(folder):
        pass


def test_a_run_that_is_being_trained_elsewhere_is_refused_and_a_finished_one_is_not(tmp_path: Path) -> None:
    config = TrainConfig(steps=2, learning_rate=1e-3, rank=4, network_alpha=4.0, resolution=64)

    def run() -> Run:
        return Run(small_base(), small_subject(), small_class_images(), config, tmp_path, torch.device("cpu"))

    first = run().events()
    assert isinstance(first, types.GeneratorType)
    while not isinstance(next(first), StepDone):
        pass
    with pytest.raises(SubjectBoothError, match="one program per run"):
        list(run().events())
    list(first)
    with lock_folder(run().folder.path):  # another program may even retrain it: the finished adapter is there
        assert [type(event) for event in run().events()] == [Finished]


@pytest.mark.skipif(os.name == "nt", reason="locks of another kind")
def test_a_drive_without_locks_is_used_with_a_warning(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    import fcntl

    def refuse(*_: object) -> None:
        raise OSError(errno.ENOLCK, "No locks available")

    monkeypatch.setattr(fcntl, "flock", refuse)
    with lock_folder(tmp_path):
        pass
    assert "without file locks" in caplog.text
