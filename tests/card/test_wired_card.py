"""The connected model on a pretended card (tests/card/device.py), trained through ComfyUI's own code."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from subjectbooth.tests.card.wired_rehearsal import REHEARSALS, ROOT
from subjectbooth.tests.comfy_server.server import find_comfyui

Found = dict[str, Any]


@pytest.fixture(scope="module")
def rehearsed(tiny_checkpoint: Path) -> dict[str, Found]:
    """All rehearsals, from one process of their own: a registered device stays."""
    comfyui = find_comfyui(ROOT)
    if comfyui is None:
        pytest.skip("ComfyUI not found")
    script = Path(__file__).with_name("wired_rehearsal.py")
    done = subprocess.run(
        [sys.executable, str(script), str(comfyui), str(tiny_checkpoint), *REHEARSALS],
        capture_output=True,
        text=True,
        encoding="utf-8",
        env={**os.environ, "OMP_NUM_THREADS": "1", "PYTHONIOENCODING": "utf-8"},
        check=False,
    )
    assert done.returncode == 0, done.stderr[-3000:]
    lines = [json.loads(line) for line in done.stdout.splitlines() if line.startswith("{")]
    return {line["rehearsal"]: line for line in lines}


@pytest.mark.parametrize("name", REHEARSALS)
def test_the_connected_model_trains_on_a_card(rehearsed: dict[str, Found], name: str) -> None:
    """That it trains at all says that no operation mixes devices."""
    found, settings = rehearsed[name], REHEARSALS[name]
    assert len(found["steps"]) == 3 and found["layers"] > 0
    assert "unknown" not in found["plan"]  # its memory was counted, in the precision of training
    for step in found["steps"][1:]:
        scaling = {"loop._learn": 1} if settings["precision"] == "fp16" else {}
        assert step["syncs"] == {"loop._finite": 1, **scaling}
    # The next step's photo, and what the model itself makes on the CPU: tables of the time or the positions.
    assert found["steps"][2]["uploads"].get("loss.batch_losses", 0) <= 2
    assert found["pictures"] == ([[1, 128, 128, 3]] if "validation_prompts" in settings else [])
    assert found["left"] == 0  # ComfyUI has unloaded the model, and nothing else was left
