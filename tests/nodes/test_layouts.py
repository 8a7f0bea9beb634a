"""The true layouts of every family, full size on the meta device, against ComfyUI's own models of them."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from subjectbooth.tests.comfy_server import find_comfyui

ROOT = Path(__file__).resolve().parents[2]


@pytest.fixture(scope="module")
def layouts() -> dict[str, Any]:
    comfyui = find_comfyui(ROOT)
    if comfyui is None:
        pytest.fail("No ComfyUI here: run scripts/get_comfyui.py or set COMFYUI_PATH.")
    done = subprocess.run(
        [sys.executable, str(ROOT / "tests" / "nodes" / "layouts.py"), str(comfyui)],
        capture_output=True,
        text=True,
        timeout=300,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout.splitlines()[-1])


# Parameters of the published UNets; layers: four projections in each of two attentions of every transformer block.
@pytest.mark.comfy
@pytest.mark.parametrize(
    ("family", "parameters", "layers"),
    [("SD 1.x", 859_520_964, 16 * 8), ("SD 2.x", 865_910_724, 16 * 8), ("SDXL", 2_567_463_684, 70 * 8)],
)
def test_a_true_layout_is_read_weight_by_weight_and_its_adapter_taken_key_by_key(
    layouts: dict[str, Any], family: str, parameters: int, layers: int
) -> None:
    found = layouts[family]
    assert found["family"] == family
    assert found["parameters"] == parameters
    assert found["same_names"]
    assert found["same_shapes"]
    assert found["names_backwards"]  # as a diffusers folder is read
    assert found["layers"] == found["taken"] == layers
    assert found["wired_layers"]
    assert found["diffusers_names_taken"]  # diffusers' own file of the same adapter is for the same weights


@pytest.mark.comfy
@pytest.mark.parametrize(
    ("marks", "prediction_type", "last"),
    [("", "epsilon", 0.00466), ("v_pred", "v_prediction", 0.00466), ("v_pred ztsnr", "v_prediction", 0.0)],
)
def test_sdxls_marks_mean_the_same_in_a_graph_and_from_a_file(
    layouts: dict[str, Any], marks: str, prediction_type: str, last: float
) -> None:
    found = layouts["sampling"][marks]
    assert found["prediction_type"] == prediction_type
    assert found["last"] == pytest.approx(last, abs=1e-5)
    assert found["difference"] < 1e-6
