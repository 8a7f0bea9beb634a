"""The example workflow in the real graph editor: it opens as it was saved, Run is pressed, the pictures appear."""

from __future__ import annotations

import json
import os
import re
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest

from subjectbooth.scripts.workflow import to_api
from subjectbooth.tests.comfy_server import ComfyClient
from subjectbooth.tests.js.browser import Page, find_chromium, open_editor
from subjectbooth.tests.js.panel_steps import keep_picture

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
    with open_editor(_comfy_client, width=1440, height=900) as page:
        page.evaluate(f"app.extensionManager.setting.set('{MISSING_MODELS}', false)")
        yield page


VUE = "Comfy.VueNodes.Enabled"
READABLE = 0.6
"""Below, the editor draws grey boxes in place of text."""
OVERLAPPING = """(() => {
  const drawn = [...document.querySelectorAll('[data-node-id]')]
    .map(e => [e.dataset.nodeId, e.getBoundingClientRect()]);
  const boxes = drawn.length
    ? drawn.map(([id, b]) => [id, b.x, b.y, b.x + b.width, b.y + b.height])
    : app.graph.nodes.map(n => [n.id, ...n.getBounding()]).map(([id, x, y, w, h]) => [id, x, y, x + w, y + h]);
  const name = id => app.graph.getNodeById(Number(id))?.title;
  return boxes.flatMap((a, i) => boxes.slice(i + 1)
    .filter(b => a[1] < b[3] && b[1] < a[3] && a[2] < b[4] && b[2] < a[4]).map(b => [name(a[0]), name(b[0])]));
})()"""
COVERED = """(() => {
  const { ds, canvas } = app.canvas, place = canvas.getBoundingClientRect();
  const boxes = [...document.querySelectorAll('.dom-widget')].filter(e => e.offsetWidth)
    .map(e => e.getBoundingClientRect());
  const labels = app.graph.nodes.filter(n => !n.flags.collapsed).flatMap(n => [true, false].flatMap(isInput =>
    ((isInput ? n.inputs : n.outputs) ?? []).map((slot, i) => {
      const [x, y] = n.getConnectionPos(isInput, i);
      return slot.widget ? null : [`${n.title}: ${slot.name}`, x + (isInput ? 20 : -20), y];
    }).filter(Boolean)));
  return labels.filter(([, x, y]) => {
    const left = place.x + (x + ds.offset[0]) * ds.scale, top = place.y + (y + ds.offset[1]) * ds.scale;
    return boxes.some(b => b.left < left && left < b.right && b.top < top && top < b.bottom);
  }).map(([name]) => name);
})()"""
"""Names of inputs and outputs that lie under an element of the page: it belongs to another place."""
ALL_NODES = "(function all(g) { return g.nodes.flatMap(n => n.subgraph ? all(n.subgraph) : [n]); })(app.graph)"


@contextmanager
def nodes_2_0(page: Page) -> Iterator[None]:
    """The editor's newer renderer, which draws nodes as elements of the page."""
    page.evaluate(f"app.extensionManager.setting.set('{VUE}', true)")
    try:
        page.wait_for("window.LiteGraph.vueNodesMode === true && document.querySelector('[data-node-id]')")
        yield
    finally:
        page.evaluate(f"app.extensionManager.setting.set('{VUE}', false)")
        page.wait_for("window.LiteGraph.vueNodesMode === false")


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


def values_of(workflow: dict[str, Any]) -> dict[tuple[str, int], Any]:
    """The widgets' values of all nodes, those in subgraphs too; a subgraph's own node only repeats its inputs."""
    boxes = {box["id"]: box["nodes"] for box in workflow.get("definitions", {}).get("subgraphs", [])}
    return {
        (place, node["id"]): node.get("widgets_values") or []
        for place, nodes in [("", workflow["nodes"]), *boxes.items()]
        for node in nodes
        if node["type"] not in boxes
    }


@pytest.mark.parametrize("path", EXAMPLES, ids=lambda path: path.stem)
def test_example_opens_as_saved(page: Page, comfy: ComfyClient, path: Path) -> None:
    """No dialog about missing nodes, no toast, no changed value; and our converter says what the editor says."""
    workflow = json.loads(path.read_text(encoding="utf-8"))
    load(page, workflow)
    assert page.evaluate("document.querySelectorAll('.p-dialog, .p-toast-message').length") == 0
    again = page.evaluate("app.graph.serialize()")
    assert values_of(again) == values_of(workflow)
    assert len(again["links"]) == len(workflow["links"])
    editors = page.evaluate("app.graphToPrompt().then(p => p.output)")
    assert without_meta(to_api(workflow, comfy.object_info())) == without_meta(editors)
    page.wait_for(f"app.canvas.ds.scale >= {READABLE}", 10)
    assert page.evaluate(OVERLAPPING) == []
    page.wait_for(f"{COVERED}.length === 0", 10)  # elements follow the view a moment later
    keep_picture(page, path.stem)


def test_run_button_trains_and_shows_pictures(page: Page, comfy: ComfyClient) -> None:
    """The main example with few steps, by mouse; progress, the panel's end and pictures are seen on its nodes."""
    workflow = json.loads((ROOT / "example_workflows" / "train_and_sample.json").read_text(encoding="utf-8"))
    load(page, workflow)
    few = {
        "GenerateClassPriors": {"count": 2, "steps": 2},
        # A seed of its own: nodes/test_examples.py does the same training on the same server, and what was trained
        # before is found again without a step of progress.
        "DreamBoothLoRATrain": {
            "steps": 4,
            "validation_interval": 2,
            "output_name": "ui_test",
            "seed": 20_261_126,
            "preservation": "none",  # the default studies the base first, which takes longer than all the rest
        },
        "KSampler": {"steps": 2},
    }
    page.evaluate(
        f"Object.entries({json.dumps(few)}).forEach(([type, values]) => {ALL_NODES}.filter(n => n.type === type)"
        ".forEach(n => n.widgets.forEach(w => { if (w.name in values) w.value = values[w.name]; })))"
    )
    save = next(node["id"] for node in workflow["nodes"] if node["type"] == "SaveImage")
    trainer = next(node["id"] for node in workflow["nodes"] if node["type"] == "DreamBoothLoRATrain")
    page.evaluate(
        "window.seen = {progress: [], text: []};"
        " app.api.addEventListener('progress',"
        " ({detail: d}) => window.seen.progress.push([d.node, d.value, d.max]));"
        " app.api.addEventListener('progress_text', e => { window.seen.text.push(e.detail.text); });"
        " window.seen.shown = []; setInterval(() => { for (const n of app.graph.nodes) if (n.type === "
        "'DreamBoothLoRATrain') for (const w of n.widgets) if (w.name === '$$node-text-preview' &&"
        " !window.seen.shown.includes(w.value)) window.seen.shown.push(w.value); }, 100)"
    )
    page.click("document.querySelector('[data-testid=\"queue-button\"]')")
    ended = page.wait_for(f"app.nodeOutputs['{save}']?.images || app.lastExecutionError", 480)
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
    texts = "app.graph.nodes.filter(n => n.widgets?.some(w => w.name === '$$node-text-preview')).map(n => n.type)"
    page.wait_for(f"{texts}.every(type => !['DreamBoothLoRATrain', 'GenerateClassPriors'].includes(type))", 10)
    shown = page.evaluate("window.seen.shown")
    assert not [text for text in shown if re.match(r"step |training on ", text)], "the panel shows that"
    panel = page.evaluate("(e => [e.dataset.state, e.dataset.step])(document.querySelector('.subjectbooth-train'))")
    assert panel == ["finished", "4"]
    page.wait_for(
        "[...document.querySelectorAll('.sbt-class img')].map(i => i.naturalWidth > 100).join() === 'true,true'", 30
    )
    title = page.evaluate("document.querySelector('.sbt-class .sbt-line').textContent")
    assert re.fullmatch(r"The class: a photo of a dog ?drift \d\.\d\d", title), title  # the demo base has a judge
    assert page.evaluate("(e => e.scrollHeight <= e.clientHeight)(document.querySelector('.subjectbooth-train'))")
    assert page.evaluate(OVERLAPPING) == []
    keep_picture(page, "after the run")
    with nodes_2_0(page):
        page.wait_for("document.querySelectorAll('[data-node-id] .sbt-class img').length === 2")
        page.wait_for(f"{OVERLAPPING}.length === 0", 30)  # nodes are laid out one after the other
        keep_picture(page, "after the run, Nodes 2.0")
    large = "document.querySelector('.subjectbooth-large')"
    page.evaluate("document.querySelector('.sbt-pictures img').click()")
    page.wait_for(f"{large}.contains(document.activeElement)")
    for kind in ("keyDown", "keyUp"):
        page.call("Input.dispatchKeyEvent", type=kind, key="Escape", code="Escape", windowsVirtualKeyCode=27)
    page.wait_for(f"!{large}")
    ours = [m for m in page.console if "/extensions/SubjectBooth/" in m.url + m.text and m.level != "log"]
    assert not ours, ours


def test_no_nodes_overlap_in_the_other_renderer(page: Page) -> None:
    with nodes_2_0(page):
        for path in EXAMPLES:
            load(page, workflow := json.loads(path.read_text(encoding="utf-8")))
            page.wait_for(f"document.querySelectorAll('[data-node-id]').length === {len(workflow['nodes'])}")
            page.wait_for(f"{OVERLAPPING}.length === 0", 30)
            keep_picture(page, f"{path.stem}, Nodes 2.0")


def workflow_value(workflow: dict[str, Any], kind: str, place: int) -> Any:
    boxes = workflow.get("definitions", {}).get("subgraphs", [])
    nodes = [*workflow["nodes"], *(node for box in boxes for node in box["nodes"])]
    node = next(node for node in nodes if node["type"] == kind)
    return node["widgets_values"][place]
