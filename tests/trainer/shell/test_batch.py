"""``python -m trainer batch`` on a small base from a file."""

from __future__ import annotations

import csv
import json
import os
import shutil
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
from subjectbooth.trainer.errors import SubjectBoothError
from subjectbooth.trainer.learn import loop
from subjectbooth.trainer.runs.lora_reader import read_lora
from subjectbooth.trainer.shell import batch
from subjectbooth.trainer.shell.subjects import options_of, read_subjects

COMMON = ["--steps=2", "--resolution=64", "--preservation=none", "--validation_interval=0", "--rank=4"]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("batch")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(families, "FAMILIES", tuple(NARROW.values()))
        write_pair(folder, "SD 1.x")
    (folder / "subjects").mkdir()
    for name in ("tom", "kit"):
        write_cat_photos(folder / "subjects" / name)
    shutil.copytree(folder / "subjects" / "tom", folder / "subjects" / "broken")
    (folder / "subjects" / "broken" / "0.png").write_bytes(b"not a picture")
    return folder


def listed(folder: Path, *lines: str) -> Path:
    path = folder / "subjects.csv"
    path.write_text("\n".join(lines), "utf-8")
    return path


def statuses(output: Path) -> dict[str, str]:
    with (output / "batch.csv").open(encoding="utf-8", newline="") as file:
        return {row["name"]: row["status"] for row in csv.DictReader(file)}


def test_each_subject_is_trained_as_by_itself_and_a_failed_one_is_named(
    folder: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(families, "FAMILIES", tuple(NARROW.values()))
    rows = [
        "photos,class_word,output_name,seed",
        "subjects/tom,cat,cats/tom,3",
        "subjects/broken,cat,,",
        "subjects/kit,cat,,",
    ]
    base, output = ["--base", str(folder / "single.safetensors")], folder / "out"
    command = ["batch", str(listed(folder, *rows)), *base, *COMMON, "--output_dir", str(output), "--cpu"]
    assert shell.main(command) == 1
    with (output / "batch.csv").open(encoding="utf-8", newline="") as file:
        table = {row["name"]: row for row in csv.DictReader(file)}
    assert [row["status"] for row in table.values()] == ["trained", "failed", "trained"]
    assert "0.png" in table["broken"]["problem"] and table["kit"]["step"] == "2"
    alone = ["--photos", str(folder / "subjects" / "tom"), "--class_word", "cat", "--seed", "3", "--cpu"]
    assert shell.main([*base, *COMMON, *alone, "--output_dir", str(folder / "alone")]) == 0
    files = output / "cats" / "tom.safetensors", folder / "alone" / "my_subject.safetensors"
    of_batch, by_itself = (read_lora(path)[1] for path in files)
    for name in ("subjectbooth.run_key", "sshs_model_hash"):
        assert of_batch[name] == by_itself[name]
    logs = {path: path.read_bytes() for path in output.glob("runs/*/events.jsonl")}
    assert shell.main(command) == 1  # finished: nothing is trained twice
    assert len(logs) == 2 and all(path.read_bytes() == content for path, content in logs.items())
    assert "2 of 3 subjects trained" in capsys.readouterr().out


def test_all_bad_rows_are_named_before_anything_runs(folder: Path) -> None:
    rows = [
        "photos,class_word,output_name,steps",
        "subjects/tom,cat,tom,many",
        "subjects/nobody,cat,,2",
        "subjects/tom,,other,2",
        ",cat,third,2",
        "subjects/kit,cat,kit,2",
        "subjects/tom,cat,kit,2",
        "subjects/tom,cat,last,2,5",
    ]
    with pytest.raises(SubjectBoothError) as found:
        read_subjects(listed(folder, *rows), ["--base", str(folder / "single.safetensors")], folder)
    first, *lines = str(found.value).splitlines()
    assert first.startswith("6 of 7 subjects cannot be used.")
    wanted = ("line 2: ", "'many'"), ("line 3: ", "nobody"), ("line 4: ", "class_word"), ("line 5: ", "photos is empty")
    wanted += ("line 7: ", "'kit' is also that of line 6"), ("line 8: ", "more cells than columns")
    for line, (place, problem) in zip(lines, wanted, strict=True):
        assert line.startswith(place) and problem.lower() in line.lower()


def test_a_wrong_column_is_named(folder: Path) -> None:
    with pytest.raises(SubjectBoothError, match="Unknown name 'clas_word'.* Use class_word"):
        read_subjects(listed(folder, "photos,clas_word", "subjects/tom,cat"), [], folder)


def test_each_folder_is_a_subject(folder: Path) -> None:
    jobs = read_subjects(folder / "subjects", ["--base", "narrow", "--class_word", "cat", *COMMON], folder)
    assert [job.name for job in jobs] == ["broken", "kit", "tom"]
    assert options_of(jobs[2]).photos == folder / "subjects" / "tom" and options_of(jobs[2]).steps == 2


def test_a_run_resumes_on_another_machine_from_the_store(
    folder: Path, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    """Neither machine sees the other's output folder, and class images are drawn once."""
    monkeypatch.setattr(families, "FAMILIES", tuple(NARROW.values()))
    rows = ["photos,class_word", "subjects/tom,cat"]
    command = ["batch", str(listed(folder, *rows)), "--base", str(folder / "single.safetensors"), *COMMON]
    command += ["--preservation=class_images", "--num_class_images=1", "--checkpoint_seconds=0", "--cpu"]
    command += ["--steps=3", "--output_dir"]
    stored = [f"--store=file://{(tmp_path / 'store').as_posix()}"]
    trained: list[int] = []
    learn = loop.Training._learn

    def stops_at_the_third(training: loop.Training, *given: Any) -> Any:
        if len(trained) == 2:
            trained.append(0)
            raise KeyboardInterrupt
        trained.append(training.step + 1)
        return learn(training, *given)

    monkeypatch.setattr(loop.Training, "_learn", stops_at_the_third)
    assert shell.main([*command, str(tmp_path / "first"), *stored]) == 130
    assert shell.main([*command, str(tmp_path / "second"), *stored]) == 0
    assert shell.main([*command, str(tmp_path / "third"), *stored]) == 0
    assert trained == [1, 2, 0, 3]
    assert shell.main([*command, str(tmp_path / "alone")]) == 0
    hashes = [
        read_lora(tmp_path / place / "tom.safetensors")[1]["sshs_model_hash"]
        for place in ("second", "third", "store", "alone")
    ]
    assert len(set(hashes)) == 1
    assert statuses(tmp_path / "store") == {"tom": "trained"}
    images = [[file.read_bytes() for file in (tmp_path / at).rglob("00000-*")] for at in ("first", "second", "store")]
    assert len(images[0]) == 1 and images[0] == images[1] == images[2]


def test_a_store_that_cannot_be_used_is_named(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    command = [str(folder / "subjects"), "--base", "narrow", "--class_word", "cat", "--cpu"]
    assert batch.main([*command, "--output_dir", str(folder / "no store"), "--store", "nowhere://x"]) == 2
    assert "nowhere" in capsys.readouterr().err


def test_without_ray_runs_go_in_order_and_a_warning_says_so(
    folder: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setitem(sys.modules, "ray", None)
    command = [str(folder / "subjects"), "--base", "narrow", "--class_word", "cat", "--steps=1", "--cpu", "--ray"]
    monkeypatch.setattr(batch.Subjects, "__call__", lambda self, job, records: records.update({1: job.name}))
    assert batch.main([*command, "--output_dir", str(folder / "no ray")]) == 0
    shown = capsys.readouterr()
    assert "Ray cannot be used" in shown.err + shown.out and "ray>=2.9" in shown.err + shown.out
    assert statuses(folder / "no ray") == {"broken": "trained", "kit": "trained", "tom": "trained"}


def test_on_ray_every_lora_is_that_of_the_serial_batch_though_a_worker_is_killed(tmp_path: Path) -> None:
    """The killed run goes on where it was: no step is trained twice."""
    pytest.importorskip("ray", reason="Ray is not installed: pip install -r requirements-cluster.txt")
    (tmp_path / "subjects").mkdir()
    for number, name in enumerate(("kit", "tom")):
        write_cat_photos(tmp_path / "subjects" / name)
        (tmp_path / "subjects" / name / f"{number}.png").unlink()  # otherwise they are one run
    common = [str(tmp_path / "subjects"), "--base", "narrow", "--class_word", "cat", "--steps", "3", "--cpu"]
    common += ["--preservation", "none", "--validation_interval", "0", "--rank", "4", "--checkpoint_seconds", "0"]
    driver = [sys.executable, str(Path(__file__).with_name("ray_driver.py")), str(tmp_path), "kit"]
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "RAY_AUTH_MODE": "disabled"}
    done = subprocess.run([*driver, *common], capture_output=True, text=True, timeout=500, env=environment)
    assert done.returncode == 0, done.stderr
    found = json.loads(done.stdout.splitlines()[-1])
    assert found["codes"] == [0, 0] and found["killed"] and found["workers"] >= 2
    assert found["trained"] == [f"{name} {step}" for name in ("kit", "tom") for step in (1, 2, 3)]
    assert statuses(tmp_path / "on Ray") == {"kit": "trained", "tom": "trained"}
    for name in ("kit", "tom"):
        serial, on_ray = (read_lora(tmp_path / place / f"{name}.safetensors") for place in ("in order", "on Ray"))
        assert serial[0].keys() == on_ray[0].keys()
        assert all(torch.equal(tensor, on_ray[0][key]) for key, tensor in serial[0].items())
        assert serial[1]["subjectbooth.run_key"] == on_ray[1]["subjectbooth.run_key"]
