"""kill -9 at random moments costs the step it falls into, and the end is bit-identical."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from subjectbooth.tests.fuzzing import SEED, report

KILLS = int(os.environ.get("SUBJECTBOOTH_KILLS", "2"))
"""Of each kind of run; `make soak` makes more."""


@pytest.mark.skipif(sys.platform != "linux", reason="forks a process that has loaded torch")
def test_killed_runs_end_bit_identical(tmp_path: Path) -> None:
    command = [sys.executable, str(Path(__file__).with_name("kill_driver.py")), str(tmp_path), str(KILLS), str(SEED)]
    env = {**os.environ, "OMP_NUM_THREADS": "1"}
    done = subprocess.run(command, env=env, capture_output=True, text=True, encoding="utf-8")
    assert done.returncode == 0, done.stderr
    rows = [json.loads(line) for line in done.stdout.splitlines() if line.startswith("{")]
    for row in rows:
        report(row.pop("name"), **row)
    assert len(rows) == 7
    assert all(row["identical"] is True for row in rows)
    assert all(row["kills"] == KILLS for row in rows)
    assert sum(row["training"] for row in rows) > 0
    # The first kill of each of the two kinds with class images waits for some of them; on a busy machine one may miss.
    assert sum(row["class images"] for row in rows) >= 1
    # A checkpoint a step: the log is one step ahead while it is being written.
    assert all(row["lost steps"] <= 1 for row in rows)
