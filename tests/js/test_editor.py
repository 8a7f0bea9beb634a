"""The example workflow in the real graph editor: it opens as it was saved, Run is pressed, the pictures appear."""

from __future__ import annotations

import json
import os
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from subjectbooth.scripts.workflow import to_api
from subjectbooth.tests.comfy_server import ComfyClient
from subjectbooth.tests.js.browser import Page, find_chromium, open_editor

ROOT = Path(__file__).resolve().parent.parent.parent
EXAMPLES = sorted((ROOT / "example_workflows").glob("*.json"))
pytestmark = [
    pytest.mark.comfy,
    pytest.mark.skipif(not find_chromium(), reason="no Chromium on this machine (CHROMIUM_PATH names one)"),
    pytest.mark.skipif(
        not (ROOT / "demo" / "weights" / "demo_base.safetensors").is_file(), reason="the demo base is not trained yet"
    ),
]


MISSING_MODELS = "Comfy.Workflow.ShowMissingModelsWarning"


@pytest.fixture(scope="module")
def page(_comfy_client: ComfyClient) -> Iterator[Page]:
    """The editor in a browser, as somebody sees it who has been there before."""
    with open_editor(_comfy_client) as page:
        page.evaluate(f"app.extensionManager.setting.set('{MISSING_MODELS}', false)")
        yield page


def load(page: Page, workflow: dict[str, Any]) -> None:
    page.evaluate(f"app.loadGraphData({json.dumps(workflow)})")
    # Pictures are loaded only for nodes that are on the screen.
    page.evaluate("app.extensionManager.command.execute('Comfy.Canvas.FitView')")


def test_the_editor_names_the_files_that_an_example_needs(page: Page) -> None:
    """With their folders, to download them."""
    workflow = json.loads((ROOT / "example_workflows" / "z_image_train_and_sample.json").read_text(encoding="utf-8"))
    names = [model["name"] for node in workflow["nodes"] for model in node["properties"].get("models", [])]
    assert len(names) == 3
    page.evaluate(f"app.extensionManager.setting.set('{MISSING_MODELS}', true)")
    try:
        load(page, workflow)
        # Newer editors only say how many problems there are, until one asks.
        ask = "[...document.querySelectorAll('button')].find(b => b.innerText.trim() === 'View details')?.click()"
        for name in names:
            page.wait_for(f"({ask}, document.body.innerText.includes({json.dumps(name)}))", 30)
    finally:
        page.evaluate(f"app.extensionManager.setting.set('{MISSING_MODELS}', false)")
        page.evaluate(
            "document.querySelectorAll('.p-dialog button').forEach(b => b.ariaLabel === 'Close' && b.click())"
        )
        page.wait_for("!document.querySelector('.p-dialog')", 10)


def without_meta(prompt: dict[str, Any]) -> dict[str, Any]:
    return {k: {"class_type": v["class_type"], "inputs": v["inputs"]} for k, v in prompt.items()}


@pytest.mark.parametrize("path", EXAMPLES, ids=lambda path: path.stem)
def test_example_opens_as_saved(page: Page, comfy: ComfyClient, path: Path) -> None:
    """No dialog about missing nodes, no toast, no changed value; and our converter says what the editor says."""
    workflow = json.loads(path.read_text(encoding="utf-8"))
    load(page, workflow)
    assert page.evaluate("document.querySelectorAll('.p-dialog, .p-toast-message').length") == 0
    again = page.evaluate("app.graph.serialize()")
    saved = {node["id"]: node.get("widgets_values") or [] for node in workflow["nodes"]}
    assert {node["id"]: node.get("widgets_values") or [] for node in again["nodes"]} == saved
    assert len(again["links"]) == len(workflow["links"])
    editors = page.evaluate("app.graphToPrompt().then(p => p.output)")
    assert without_meta(to_api(workflow, comfy.object_info())) == without_meta(editors)


def test_run_button_trains_and_shows_pictures(page: Page, comfy: ComfyClient) -> None:
    """The main example with few steps, by mouse; progress, the panel's end and pictures are seen on its nodes."""
    workflow = json.loads((ROOT / "example_workflows" / "train_and_sample.json").read_text(encoding="utf-8"))
    load(page, workflow)
    few = {
        "GenerateClassPriors": {"count": 2, "steps": 2},
        # A seed of its own: nodes/test_examples.py does the same training on the same server, and what was trained
        # before is found again without a step of progress.
        "DreamBoothLoRATrain": {"steps": 4, "validation_interval": 2, "output_name": "ui_test", "seed": 20_261_126},
        "KSampler": {"steps": 2},
    }
    page.evaluate(
        f"Object.entries({json.dumps(few)}).forEach(([type, values]) => app.graph.nodes.filter(n => n.type === type)"
        ".forEach(n => n.widgets.forEach(w => { if (w.name in values) w.value = values[w.name]; })))"
    )
    save = next(node["id"] for node in workflow["nodes"] if node["type"] == "SaveImage")
    trainer = next(node["id"] for node in workflow["nodes"] if node["type"] == "DreamBoothLoRATrain")
    page.evaluate(
        "window.seen = {progress: [], text: []};"
        " app.api.addEventListener('progress',"
        " ({detail: d}) => window.seen.progress.push([d.node, d.value, d.max]));"
        " app.api.addEventListener('progress_text', e => { window.seen.text.push(e.detail.text); })"
    )
    page.click("document.querySelector('[data-testid=\"queue-button\"]')")
    ended = page.wait_for(f"app.nodeOutputs['{save}']?.images || app.lastExecutionError", 240)
    assert isinstance(ended, list), ended
    assert len(ended) == workflow_value(workflow, "EmptyLatentImage", 2)
    assert len(page.evaluate(f"app.nodeOutputs['{trainer}'].images")) == 2, "a picture at each of two validations"
    page.wait_for(f"app.graph.getNodeById({save}).imgs?.every(i => i.naturalWidth > 0)", 30)
    if os.environ.get("SUBJECTBOOTH_SCREENSHOT"):
        page.screenshot(Path(os.environ["SUBJECTBOOTH_SCREENSHOT"]))
    seen = page.evaluate("window.seen")
    # However quick the machine is: the bar never goes back, moves while it trains and ends full.
    steps = [(value, of) for node, value, of in seen["progress"] if str(node) == str(trainer)]
    assert steps == sorted(steps) and steps[-1] == (4, 4), steps
    assert {value for value, _ in steps} >= {1, 2, 3, 4}, steps
    said = [text for text in seen["text"] if text.startswith("trained: ui_test")]
    assert said and "step 4, matched" in said[0], seen["text"]
    panel = page.evaluate("(e => [e.dataset.state, e.dataset.step])(document.querySelector('.subjectbooth-train'))")
    assert panel == ["finished", "4"]
    page.wait_for(
        "[...document.querySelectorAll('.sbt-class img')].map(i => i.naturalWidth > 100).join() === 'true,true'", 30
    )
    title = page.evaluate("document.querySelector('.sbt-class .sbt-line').textContent")
    assert re.fullmatch(r"The class: a photo of a dog ?drift \d\.\d\d", title), title  # the demo base has a judge
    assert page.evaluate("(e => e.scrollHeight <= e.clientHeight)(document.querySelector('.subjectbooth-train'))")
    ours = [m for m in page.console if "/extensions/SubjectBooth/" in m.url + m.text and m.level != "log"]
    assert not ours, ours


def workflow_value(workflow: dict[str, Any], kind: str, place: int) -> Any:
    node = next(node for node in workflow["nodes"] if node["type"] == kind)
    return node["widgets_values"][place]
