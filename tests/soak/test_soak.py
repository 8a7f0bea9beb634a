"""The whole program from a shell, with all options and class images, is killed twice and ends bit-identical.

Runs in forks, many times faster, are killed by test_kill.py."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from subjectbooth.tests.comfy_server import find_comfyui

ROOT = Path(__file__).resolve().parents[2]


@pytest.mark.skipif(not os.environ.get("SUBJECTBOOTH_SLOW"), reason="starts the program four times: some minutes")
def test_killed_trainings_end_bit_identical() -> None:
    command = [
        sys.executable,
        str(ROOT / "tests" / "soak"),
        "--only",
        "all of it",
        "--kills",
        "2",
        "--steps",
        "10",
        "--comfyui-kills",
        "0",
        "--fork-kills",
        "0",
        "--inputs",
        "0",
        "--runs",
        "0",
        "--no-write",
    ]
    env = {**os.environ, "SUBJECTBOOTH_PYTHON": sys.executable, "PYTHONIOENCODING": "utf-8"}
    comfyui = find_comfyui(ROOT)
    if comfyui is not None:
        env["COMFYUI_PATH"] = str(comfyui)
    done = subprocess.run(command, cwd=ROOT, env=env, capture_output=True, text=True, encoding="utf-8")
    print(done.stdout)
    assert done.returncode == 0, done.stderr
    (plan,) = json.loads(done.stdout[done.stdout.index("{") :])["kills"]["rows"]
    assert plan["identical"] is True
    assert plan["kills"] == 2
