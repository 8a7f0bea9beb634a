"""What ships in example_workflows/ runs as it is, over the API, with fewer steps."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from subjectbooth.scripts.comfy_server import ComfyClient
from subjectbooth.scripts.workflow import to_api

ROOT = Path(__file__).resolve().parent.parent.parent
EXAMPLES = sorted((ROOT / "example_workflows").glob("*.json"))
FEW: dict[str, dict[str, Any]] = {
    "GenerateClassPriors": {"count": 2, "steps": 2},
    "DreamBoothLoRATrain": {"steps": 4, "validation_interval": 2},
    "KSampler": {"steps": 2},
}
pytestmark = pytest.mark.skipif(
    not (ROOT / "demo" / "weights" / "demo_base.safetensors").is_file(), reason="the demo base is not trained yet"
)


def test_there_is_an_example_with_a_picture() -> None:
    assert ROOT / "example_workflows" / "train_and_sample.json" in EXAMPLES
    for path in EXAMPLES:
        assert path.with_suffix(".jpg").is_file(), f"{path.name} has no picture for the template browser"


@pytest.mark.parametrize("path", EXAMPLES, ids=lambda path: path.stem)
def test_example_runs(comfy: ComfyClient, path: Path) -> None:
    prompt = to_api(json.loads(path.read_text(encoding="utf-8")), comfy.object_info())
    for node in prompt.values():
        node["inputs"].update(FEW.get(node["class_type"], {}))
        if node["class_type"] == "DreamBoothLoRATrain":
            node["inputs"]["output_name"] = f"examples/{path.stem}"
    result = comfy.run(prompt)
    kinds = {prompt[node_id]["class_type"]: shown for node_id, shown in result.outputs.items()}
    assert kinds["SaveImage"]["images"]
    assert comfy.server is not None
    assert (comfy.server.models_dir / "loras" / "examples" / f"{path.stem}.safetensors").is_file()


@pytest.mark.parametrize("path", EXAMPLES, ids=lambda path: path.stem)
def test_template_browser_serves_it(comfy: ComfyClient, path: Path) -> None:
    listed = comfy.request("GET", "/workflow_templates")
    assert path.stem in listed["SubjectBooth"]
    served = comfy.request("GET", f"/api/workflow_templates/SubjectBooth/{path.name}")
    assert served == json.loads(path.read_text(encoding="utf-8"))
