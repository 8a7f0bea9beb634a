"""The live panel in the real graph editor: Run is pressed, it fills, the run is stopped, kept and continued; a reload
in the middle and after; in a subgraph; in both renderers."""

from __future__ import annotations

import concurrent.futures
import json
import os
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from subjectbooth.tests.comfy_server import ComfyClient
from subjectbooth.tests.js.browser import READY, Page, find_chromium, open_editor
from subjectbooth.tests.nodes.graphs import node
from subjectbooth.tests.nodes.training_graphs import SIZE, train_node
from subjectbooth.trainer.files.safetensors_file import read_metadata

pytestmark = [
    pytest.mark.comfy,
    pytest.mark.skipif(not find_chromium(), reason="no Chromium on this machine (CHROMIUM_PATH names one)"),
]

SHOTS = Path(os.environ.get("SUBJECTBOOTH_SHOTS", Path(__file__).parent / "shots"))
PANEL = "[...document.querySelectorAll('.subjectbooth-train')].find(e => e.offsetWidth)"
RUN = "document.querySelector('[data-testid=\"queue-button\"]')"
PICTURES_BESIDE = (
    "[...document.querySelectorAll('[data-node-id] img')].filter(i => i.offsetWidth"
    " && !i.closest('.subjectbooth-train') && i.closest('[data-node-id]').querySelector('.subjectbooth-train')).length"
    " + (app.graph.nodes.find(n => n.type === 'DreamBoothLoRATrain').imgs?.length ?? 0)"
)
ROOT = "(app.rootGraph ?? app.graph)"
TEMPLATE_ID = json.loads(
    (Path(__file__).parents[2] / "example_workflows" / "train_only.json").read_text(encoding="utf-8")
)["id"]
BLUE = (59, 142, 234)  # the subject's curve


@pytest.fixture
def page(_comfy_client: ComfyClient) -> Iterator[Page]:
    """A browser for each test: a trainer opened after a switch to Nodes 2.0 shows no panel until a reload."""
    with open_editor(_comfy_client, timeout=120, height=1400) as page:
        yield page


def graph(**train: Any) -> dict[str, Any]:
    """The checkpoint "1", the sample dog "10", the trainer "11"."""
    subject = {
        "images": "",
        "folder": "",
        "sample": "dog",
        "class_word": "dog",
        "token": "ohwx",
        "prompt_template": "a photo of {token} {class}",
        "captions": "template",
        "resolution": SIZE,
        "crop": "center",
    }
    return {
        "1": node("CheckpointLoaderSimple", ckpt_name="tiny15.safetensors"),
        "10": node("LoadSubjectImages", **subject),
        "11": train_node(**train),
    }


def load(page: Page, prompt: dict[str, Any], name: str) -> None:
    page.evaluate(f"app.loadApiJson({json.dumps(prompt)}, {json.dumps(name)})")
    page.wait_for("app.graph.nodes.length === 3")
    look_at_panel(page)


def look_at_panel(page: Page) -> None:
    """Bring all nodes on the screen. Nodes 2.0 measures a new node a moment later, and shows none that is outside."""
    page.wait_for(f"(app.extensionManager.command.execute('Comfy.Canvas.FitView'), !!{PANEL})")


def reload(page: Page) -> None:
    """As the browser's button does. What is asked while the old page goes away is never answered: hence the pauses."""
    # The editor asks whether to leave unsaved changes, and the browser would wait for an answer.
    page.evaluate("window.addEventListener('beforeunload', e => e.stopImmediatePropagation(), true)")
    page.evaluate("window.old = true")
    page.call("Page.reload")
    deadline = time.monotonic() + 120
    while True:
        time.sleep(1)
        try:
            if page.evaluate("!window.old && " + READY, 10):
                break
        except (RuntimeError, concurrent.futures.TimeoutError):
            pass
        assert time.monotonic() < deadline, "the page does not come back"
    look_at_panel(page)


def use_renderer(page: Page, renderer: str) -> None:
    new = renderer == "nodes 2.0"
    page.evaluate(f"app.extensionManager.setting.set('Comfy.VueNodes.Enabled', {json.dumps(new)})")
    page.wait_for(f"!!LiteGraph.vueNodesMode === {json.dumps(new)}")


def state(page: Page) -> str:
    return str(page.evaluate(f"{PANEL}?.dataset.state"))


def until(page: Page, *states: str, step: int = 0, timeout: float = 300) -> None:
    page.wait_for(
        f"(() => {{ const e = {PANEL}; return e && {json.dumps(states)}.includes(e.dataset.state)"
        f" && Number(e.dataset.step) >= {step}; }})()",
        timeout,
    )


def button(text: str) -> str:
    return f"[...{PANEL}.querySelectorAll('button')].find(b => b.textContent === {json.dumps(text)})"


def press(page: Page, text: str) -> None:
    """Click a button of the panel. The node grows while its pictures come in, and takes the button off the screen."""
    page.wait_for(f"!!({button(text)})?.offsetWidth")
    for attempts_left in reversed(range(10)):
        look_at_panel(page)
        try:
            return page.click(button(text), timeout=3)
        except TimeoutError:
            if not attempts_left:
                raise


def shot(page: Page, name: str) -> None:
    """A picture of the editor as it is now, for people; the README's are chosen from these."""
    SHOTS.mkdir(parents=True, exist_ok=True)
    page.evaluate("app.extensionManager.command.execute('Comfy.Canvas.FitView')")
    page.evaluate("new Promise(resolve => setTimeout(resolve, 600))")
    page.screenshot(SHOTS / f"{name}.png")


def queue_is_done(comfy: ComfyClient, since: int) -> None:
    """Wait for the end of what was queued after that many events."""

    def left(event: Any) -> Any:
        return event.data.get("status", {}).get("exec_info", {}).get("queue_remaining")

    begun = comfy.wait_event(lambda event: event.type == "status" and left(event) == 1, since=since, timeout=60)
    comfy.wait_event(
        lambda event: event.type == "status" and left(event) == 0 and event.time >= begun.time, since=since, timeout=300
    )


def curve_is_drawn(page: Page, least: int) -> None:
    """Wait until so many of the chart's pixels have the colour of the subject's curve, which the next frame draws."""
    red, green, blue = BLUE
    page.wait_for(
        f"(() => {{ const c = {PANEL}.querySelector('canvas'); if (!c.width) return false;"
        " const d = c.getContext('2d').getImageData(0, 0, c.width, c.height).data; let n = 0;"
        f" for (let i = 0; i < d.length; i += 4) if (d[i + 3] > 60 && Math.abs(d[i] - {red}) < 12"
        f" && Math.abs(d[i + 1] - {green}) < 12 && Math.abs(d[i + 2] - {blue}) < 12) n += 1;"
        f" return n > {least}; }})()",
        10,
    )


def ours(page: Page) -> list[Any]:
    """Errors and warnings that name the pack: its scripts or its routes."""
    return [m for m in page.console if "subjectbooth" in (m.url + m.text).lower() and m.level not in ("log", "info")]


def test_without_a_run_there_is_a_hint_and_no_input(page: Page) -> None:
    load(page, graph(), "idle")
    assert "appear here during training" in page.evaluate(f"{PANEL}.innerText")
    # What the run will take, or that it is not known yet: other tests may have trained on this base.
    page.wait_for(f"{PANEL}.querySelector('.sbt-estimate').textContent")
    page.wait_for(f"{PANEL}.scrollHeight <= {PANEL}.clientHeight", 10)  # the hint is not cut off
    trainer = "app.graph.nodes.find(n => n.type === 'DreamBoothLoRATrain')"
    saved = page.evaluate(f"JSON.parse(JSON.stringify({trainer}.serialize()))")
    names = page.evaluate(f"{trainer}.widgets.filter(w => w.serialize !== false).map(w => w.name)")
    assert "training" not in names and len(saved["widgets_values"]) == len(names), "the panel is not saved"
    inputs = page.evaluate(
        "app.graphToPrompt().then(p => Object.values(p.output)"
        ".find(n => n.class_type === 'DreamBoothLoRATrain').inputs)"
    )
    assert "training" not in inputs
    assert inputs["after_stop"] == "keep"


@pytest.mark.parametrize("renderer", ["nodes 2.0" if os.environ.get("SUBJECTBOOTH_FRONT_END") else "classic"])
def test_run_stop_keep_continue(page: Page, comfy: ComfyClient, renderer: str) -> None:
    """In the classic renderer of the front end that ComfyUI 0.3.75 brings, and in Nodes 2.0 of the newest."""
    use_renderer(page, renderer)
    name = renderer.replace(" ", "_").replace(".", "_")
    load(
        page,
        graph(
            steps=30,
            learning_rate=0.0032 if renderer == "classic" else 0.0033,
            output_name=f"ui_{name}",
            validation_prompts="a photo of {subject}",
            validation_interval=5,
        ),
        name,
    )
    assert state(page) == "idle"
    page.click(RUN)
    until(page, "training", "drawing", step=6)
    text = page.evaluate(f"{PANEL}.innerText")
    press(page, "Stop and keep")
    until(page, "kept")
    assert "/ 30" in text and "s/step" in text and "fp32" in text and "GB" in text, text
    stopped = int(page.evaluate(f"{PANEL}.dataset.step"))
    assert 6 <= stopped < 30
    curve_is_drawn(page, 50)
    page.wait_for(f"[...{PANEL}.querySelectorAll('img')].some(i => i.naturalWidth === {SIZE})")
    page.wait_for(f"{PANEL}.innerText.includes('models/loras/ui_{name}.safetensors')")
    assert "ohwx dog" in page.evaluate(f"{PANEL}.innerText")
    shot(page, f"{name}_kept")

    # Queueing again finds it and trains nothing.
    since = len(comfy.events)
    page.click(RUN)
    queue_is_done(comfy, since)
    until(page, "kept", step=stopped)
    assert int(page.evaluate(f"{PANEL}.dataset.step")) == stopped

    widget = (
        "app.graph.nodes.find(n => n.type === 'DreamBoothLoRATrain').widgets.find(w => w.name === '{}').value"
    ).format
    page.evaluate(f"{widget('force_retrain')} = true")  # left on from before: it would throw the steps away
    press(page, "Continue")
    until(page, "finished")
    assert page.evaluate(widget("after_stop")) == "continue"
    assert page.evaluate(widget("force_retrain")) is False
    assert f'"event": "Started", "step": {stopped}' in last_log(comfy)
    page.wait_for(f"/matched (\\d+)\\/\\1/.test({PANEL}.innerText)")
    press(page, "Compare")
    page.wait_for(f"{PANEL}.querySelectorAll('figure').length === 2")
    page.evaluate(
        f"(() => {{ const s = {PANEL}.querySelector('input[type=range]'); s.value = 0;"
        " s.dispatchEvent(new Event('input')); })()"
    )
    captions = page.evaluate(f"[...{PANEL}.querySelectorAll('figcaption')].map(c => c.textContent)")
    assert captions == ["step 30", "step 5"]
    page.wait_for(f"[...{PANEL}.querySelectorAll('img')].every(i => i.naturalWidth === {SIZE})")
    page.wait_for(f"{PANEL}.clientHeight >= {PANEL}.scrollHeight", 10)
    if renderer == "nodes 2.0":
        assert page.evaluate(
            f"{PANEL}.getBoundingClientRect().right <= {PANEL}.closest('[data-node-id]').getBoundingClientRect().right"
        ), "nothing is cut off at the node's border"
    assert page.evaluate(PICTURES_BESIDE) == 0, "the editor's own grid would show the same pictures again"
    shot(page, f"{name}_finished")
    page.evaluate(
        "(() => { window.copied = ''; Object.defineProperty(navigator, 'clipboard', {configurable: true,"
        " value: {writeText: async (text) => { window.copied = text; }}}); })()"
    )
    press(page, "Copy")
    assert page.wait_for("window.copied") == "ohwx dog"

    # The slider's step becomes the result, also after a reload, until the run's own choice is taken again.
    trained = last_log(comfy)
    page.evaluate(f"{widget('force_retrain')} = true")
    press(page, "Use this step")
    page.wait_for(f"{PANEL}.innerText.includes('In use: step 5 (chosen by you)')", 120)
    assert (page.evaluate(widget("use_step")), page.evaluate(widget("force_retrain"))) == (5, False)
    assert published_step(comfy, f"ui_{name}") == "5"
    assert (state(page), page.evaluate(f"{PANEL}.dataset.step")) == ("finished", "30")
    page.wait_for(f"{PANEL}.clientHeight >= {PANEL}.scrollHeight", 10)
    line = f"{PANEL}.querySelector('.sbt-use span')"
    assert page.evaluate(f"{line}.scrollWidth <= {line}.clientWidth"), "which step is in use can be read"
    shot(page, f"{name}_chosen")
    reload(page)
    page.wait_for(f"{PANEL}.innerText.includes('In use: step 5 (chosen by you)')", 60)
    assert page.evaluate(widget("use_step")) == 5
    press(page, "Back to the run's own choice")
    page.wait_for(f"{PANEL}.innerText.includes('In use: step 30 (last)')", 120)
    assert page.evaluate(widget("use_step")) == 0
    assert published_step(comfy, f"ui_{name}") == "30"
    assert last_log(comfy) == trained, "nothing was trained"
    assert not ours(page), ours(page)
    use_renderer(page, "classic")


def published_step(comfy: ComfyClient, name: str) -> str:
    assert comfy.server is not None
    return read_metadata(comfy.server.models_dir / "loras" / f"{name}.safetensors")["subjectbooth.step"]


def last_log(comfy: ComfyClient) -> str:
    assert comfy.server is not None
    logs = (comfy.server.output_dir / "subjectbooth").glob("*/events.jsonl")
    return max(logs, key=lambda log: log.stat().st_mtime).read_text("utf-8")


def test_a_reload_in_the_middle_and_after(page: Page, comfy: ComfyClient) -> None:
    """In a template that is open twice: only the copy that was run shows the run."""
    load(page, graph(steps=5000, learning_rate=0.0034, output_name="ui_reload"), "reload")
    template = json.dumps({**page.evaluate("app.graph.serialize()"), "id": TEMPLATE_ID})
    open_template = f"app.loadGraphData({template}, true, true, 'a template', {{openSource: 'template'}})"
    page.evaluate(open_template)
    look_at_panel(page)
    own = page.evaluate(f"{ROOT}.id")
    assert own != TEMPLATE_ID
    page.click(RUN)
    until(page, "training", step=5)
    reload(page)
    until(page, "training", step=6)
    (active,) = comfy.request("GET", "/subjectbooth/active")["runs"]
    before = int(page.evaluate(f"{PANEL}.dataset.step"))
    until(page, "training", step=before + 3)
    page.wait_for(f"!{PANEL}.querySelector('canvas').hidden")
    curve_is_drawn(page, 50)  # from before the reload
    shot(page, "reloaded_in_the_middle")
    # Asking every few seconds would also get it there: the messages themselves must find the node.
    page.evaluate("import('/extensions/SubjectBooth/lib/node_path.mjs').then(m => { window.nodeOf = m.nodeOf; })")
    assert page.evaluate(f"nodeOf({ROOT}, {json.dumps(active)})?.type") == "DreamBoothLoRATrain"
    # Under another name: front end 1.58 opens a second one of the same name in place of the first.
    page.evaluate(open_template.replace("a template", "a second copy"))
    page.wait_for(f"{ROOT}.id !== {json.dumps(own)}")
    look_at_panel(page)
    assert state(page) == "idle", "another copy of the template"
    page.evaluate("app.extensionManager.command.execute('Workspace.PreviousOpenedWorkflow')")
    page.wait_for(f"{ROOT}.id === {json.dumps(own)}")
    until(page, "training", step=before + 3)
    press(page, "Stop and keep")
    until(page, "kept")
    assert active["steps"] == 5000 and active["workflow"] == own
    reload(page)
    until(page, "kept", step=before)
    text = page.evaluate(f"{PANEL}.innerText")
    assert "models/loras/ui_reload.safetensors" in text and "ohwx dog" in text and "Continue" in text, text
    assert not ours(page), ours(page)


def test_in_a_subgraph(page: Page, comfy: ComfyClient) -> None:
    load(page, graph(steps=6, learning_rate=0.0035, output_name="ui_subgraph"), "subgraph")
    page.evaluate(
        "(() => { const inside = app.graph.nodes.filter(n => n.type !== 'CheckpointLoaderSimple');"
        " window.outer = app.graph.convertToSubgraph(new Set(inside)).node; })()"
    )
    page.wait_for("app.graph.nodes.length === 2")
    since = len(comfy.events)
    page.click(RUN)
    queue_is_done(comfy, since)
    page.evaluate("app.canvas.openSubgraph(window.outer.subgraph, window.outer)")
    page.wait_for("app.canvas.graph === window.outer.subgraph")
    look_at_panel(page)
    until(page, "finished", step=6)
    assert page.evaluate("window.outer.subgraph.nodes.some(n => n.properties.subjectbooth_run)")
    curve_is_drawn(page, 20)
    shot(page, "in_a_subgraph")
    assert not ours(page), ours(page)
