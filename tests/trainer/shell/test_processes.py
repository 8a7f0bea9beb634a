"""One training by several processes: the run of one process, and what happens to one of them happens to all."""

from __future__ import annotations

import json
import socket
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch

from subjectbooth.tests.layout_pair import NARROW, write_pair
from subjectbooth.tests.small_base import write_cat_photos
from subjectbooth.trainer import __main__ as shell
from subjectbooth.trainer.base.sd import families
from subjectbooth.trainer.files.safetensors_file import read_checked
from subjectbooth.trainer.machine.processes import launched
from subjectbooth.trainer.runs.lora_reader import read_lora

pytestmark = pytest.mark.skipif(sys.platform == "win32", reason="no fork")


@pytest.fixture(scope="module")
def cases(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, dict[str, Any]]:
    """The folder of all outputs, and what became of the processes of each case."""
    folder = tmp_path_factory.mktemp("processes")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(families, "FAMILIES", tuple(NARROW.values()))
        write_pair(folder, "SD 1.x")
    write_cat_photos(folder / "photos")
    driver = Path(__file__).with_name("processes_driver.py")
    done = subprocess.run([sys.executable, str(driver), str(folder)], capture_output=True, text=True, timeout=400)
    assert done.returncode == 0, done.stderr
    return folder, json.loads(done.stdout)


def weights(folder: Path) -> torch.Tensor:
    tensors, _ = read_lora(folder / "my_subject.safetensors")
    assert any(name.startswith("lora_te") for name in tensors)
    return torch.cat([tensors[name].double().flatten() for name in sorted(tensors) if not name.endswith(".alpha")])


def losses(folder: Path) -> list[float]:
    (log,) = folder.glob("runs/*/events.jsonl")
    entries = map(json.loads, log.read_text("utf-8").splitlines())
    return [entry["loss"] for entry in entries if entry["event"] == "StepDone"]


def class_images(folder: Path) -> torch.Tensor:
    files = sorted(folder.glob("class_images/*/*.safetensors"))
    return torch.cat([read_checked(file)[0]["latents"] for file in files])


def test_two_processes_train_as_one_with_twice_the_batch(cases: tuple[Path, dict[str, Any]]) -> None:
    """A text encoder whose last layer has no gradient included; class images are shared out."""
    folder, found = cases
    assert (found["one"]["codes"], found["two"]["codes"]) == ([0], [0, 0])
    one, two = folder / "one", folder / "two"
    assert len(losses(two)) == 4
    assert losses(two) == pytest.approx(losses(one), rel=1e-6)
    change = (weights(two) - weights(one)).norm() / weights(one).norm()
    assert float(change) <= 1e-6
    torch.testing.assert_close(class_images(two), class_images(one), rtol=1e-4, atol=1e-5)
    assert len(class_images(two)) == 3
    # The adapter's first values, then gradients once a step, whatever the number of micro-steps.
    assert found["two"]["sums"] == [1 + 4] * 2
    assert found["two"]["log"].count("trained: ") == 1  # one of them writes and reports
    names = [sorted(path.relative_to(output).as_posix() for path in output.rglob("*")) for output in (one, two)]
    assert [name for name in names[1] if "class_images" not in name] == [
        name for name in names[0] if "class_images" not in name
    ]


def test_what_happens_to_one_process_ends_all_and_the_same_command_goes_on(cases: tuple[Path, dict[str, Any]]) -> None:
    """Out of memory, killed, terminated, and a loss that is not finite, always in the second process; the rest of the
    run by one process with the batch of both."""
    folder, found = cases
    assert found["killed"]["codes"] == [2, -9]
    assert "out of memory: gradient checkpointing is now on" in found["killed"]["log"]
    assert "A process of the 2 was killed" in found["killed"]["log"]
    assert found["terminated"]["codes"] == [2, 143]
    assert "Process 2 of 2 has stopped: it was interrupted." in found["terminated"]["log"]
    assert found["not finite"]["codes"] == [2, 2]
    assert found["not finite"]["log"].count("A loss of nan at step 4, on ") == 1
    assert found["one again"]["codes"] == [0]
    assert losses(folder / "changing") == pytest.approx(losses(folder / "one"), rel=1e-6)
    change = (weights(folder / "changing") - weights(folder / "one")).norm() / weights(folder / "one").norm()
    assert float(change) <= 1e-6


def test_other_commands_run_in_one_process(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.setenv("WORLD_SIZE", "2")
    assert launched() == 1  # left over from something else, such as a job scheduler
    for name, value in {"RANK": "1", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": "1"}.items():
        monkeypatch.setenv(name, value)
    assert launched() == 2
    assert shell.main(["clean"]) == 2
    assert "Clean was started in 2 processes" in capsys.readouterr().err


def test_processes_that_cannot_connect_say_where(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        port = str(taken.getsockname()[1])
        for name, value in {"WORLD_SIZE": "2", "RANK": "0", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port}.items():
            monkeypatch.setenv(name, value)
        assert shell.main(["train", "--base", "b", "--photos", "p", "--class_word", "cat", "--cpu"]) == 2
    assert f"cannot connect to the others at 127.0.0.1:{port}" in capsys.readouterr().err
