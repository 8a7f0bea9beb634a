"""Folders that really cannot be written: one clear sentence, no traceback, and what is there stays as it was.

Root may write everywhere, so the trainer is run by a process that has become nobody (see read_only_child.py).
"""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from subjectbooth.tests.fuzzing import is_clean
from subjectbooth.tests.layout_pair import write_pair
from subjectbooth.tests.small_base import write_cat_photos
from subjectbooth.tests.trainer.shell.read_only_child import NO_RIGHT, digests

pytestmark = pytest.mark.skipif(os.name != "posix", reason="Windows has other rights, and no other user to become")

READ_ONLY, SHUT, OPEN = 0o555, 0o000, 0o777
RIGHT = "write permission"
CASES = {
    "an empty folder": ("empty", [], RIGHT),
    "a folder that is to be made": ("empty/new", [], RIGHT),
    "class images": ("empty", ["--num_class_images", "1"], "The LoRA cannot be written (Permission denied)"),
    "a longer run": ("done", ["--steps", "3"], RIGHT),
    "a forced second run": ("done", ["--force_retrain"], RIGHT),
    "a folder that nobody may enter": ("shut", [], RIGHT),
    "runs that nobody may enter": ("shut runs", [], RIGHT),
    "class images that nobody may read": ("shut", ["--num_class_images", "1"], "Class images cannot be read"),
    "cleaning up": ("shut", ["clean"], "cannot be read (Permission denied)"),
    "only the LoRA": ("only runs", [], "The LoRA cannot be written (Permission denied)"),
    "a shut folder for the LoRA": ("only runs", ["--output_name", "pets/cat"], "The LoRA cannot be written"),
    "a checkpoint that nobody may read": ("open", ["--base", "shut.safetensors"], "The checkpoint cannot be opened"),
}  # fmt: skip
"""Where it is tried, with which options besides, and what is said."""


@pytest.fixture(scope="module")
def folder() -> Iterator[Path]:
    """Not pytest's own, which nobody but its owner may enter: then each refusal would be of that."""
    made = Path(tempfile.mkdtemp(prefix="subjectbooth-read-only-"))
    made.chmod(0o755)
    yield made
    for path in [made, *made.rglob("*")]:
        if path.is_dir():
            path.chmod(0o755)
    for path in made.rglob("*"):  # what could not be entered before
        if path.is_dir():
            path.chmod(0o755)
    shutil.rmtree(made)


@pytest.fixture(scope="module")
def tried(folder: Path) -> dict[str, Any]:
    """What was said in each case."""
    write_cat_photos(folder / "photos")
    base = write_pair(folder, "SD 1.x")[0]

    def arguments(output: str, more: list[str]) -> list[str]:
        if more == ["clean"]:
            return ["clean", "--output_dir", str(folder / output), "--loras", str(folder / "empty")]
        return [
            "--base",
            str(base),
            "--photos",
            str(folder / "photos"),
            "--class-word",
            "cat",
            "--output_dir",
            str(folder / output),
            "--output_name",
            "cat",
            "--resolution",
            "64",
            "--rank",
            "2",
            "--cpu",
            *([] if "--steps" in more else ["--steps", "2"]),
            *more,
        ]

    shutil.copyfile(base, folder / "shut.safetensors")
    base.chmod(0o644)  # safetensors writes for its owner only
    for name in ("empty", "only runs/runs", "only runs/pets", "shut", "open"):
        (folder / name).mkdir(parents=True)
    plan = {
        "before": arguments("done", []),
        "made": str(folder / "done"),
        "copy": str(folder / "shut runs"),
        "modes": {
            str(folder / "empty"): READ_ONLY,
            str(folder / "only runs"): READ_ONLY,
            str(folder / "only runs" / "runs"): OPEN,
            str(folder / "only runs" / "pets"): SHUT,
            str(folder / "open"): OPEN,
            str(folder / "shut"): SHUT,
            str(folder / "shut.safetensors"): SHUT,
            str(folder / "shut runs" / "runs"): SHUT,
        },
        "cases": {name: arguments(output, more) for name, (output, more, _) in CASES.items()},
    }
    plan["cases"]["found again"] = arguments("done", [])
    (folder / "cases.json").write_text(json.dumps(plan), "utf-8")
    done = subprocess.run(
        [sys.executable, str(Path(__file__).with_name("read_only_child.py")), str(folder)],
        capture_output=True,
        text=True,
        encoding="utf-8",
        timeout=600,
        cwd=folder,
        check=False,
        env={**os.environ, "HOME": str(folder), "PYTHONIOENCODING": "utf-8", "OMP_NUM_THREADS": "1"},
    )
    if done.returncode == NO_RIGHT:
        pytest.skip(f"root may write everywhere, and may not become nobody here: {done.stderr.strip()}")
    assert done.returncode == 0, done.stderr
    lines = [json.loads(line) for line in done.stdout.splitlines()]
    return {line["case"]: line for line in lines}


@pytest.mark.parametrize("case", list(CASES))
def test_it_is_one_sentence(tried: dict[str, Any], case: str) -> None:
    told = tried[case]
    sentences = [line for line in told["error"].splitlines() if ". Required: " in line]
    print(sentences)
    assert told["code"] == 2, told["error"]
    assert len(sentences) == 1
    assert is_clean(sentences[0])
    assert CASES[case][2] in sentences[0]
    assert "step/s]" not in sentences[0], "the progress bar's line has ended"
    assert "Traceback" not in told["error"]


def test_a_finished_run_is_found_again_where_nothing_can_be_written(tried: dict[str, Any]) -> None:
    told = tried["found again"]
    assert told["code"] == 0, told["error"]
    assert "already trained" in told["out"]


def test_nothing_was_changed(tried: dict[str, Any], folder: Path) -> None:
    assert digests(folder / "done") == tried["before"]["files"]
    assert not list((folder / "empty").iterdir())
