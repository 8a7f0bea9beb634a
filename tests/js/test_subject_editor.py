"""LoadSubjectImages and GenerateClassPriors in the real graph editor: a new node, several files at once, the grid."""

from __future__ import annotations

import base64
import io
import json
from collections.abc import Iterator

import pytest
from PIL import Image
from skimage import data

from subjectbooth.tests.comfy_server import ComfyClient
from subjectbooth.tests.js.browser import Page, find_chromium, open_editor

pytestmark = [
    pytest.mark.comfy,
    pytest.mark.skipif(not find_chromium(), reason="no Chromium on this machine (CHROMIUM_PATH names one)"),
]


@pytest.fixture(scope="module")
def page(_comfy_client: ComfyClient) -> Iterator[Page]:
    with open_editor(_comfy_client) as page:
        yield page


def new_node(page: Page, kind: str) -> dict[str, object]:
    """Add one node to an empty graph, as the menu does; its widgets' values by name."""
    page.evaluate(
        f"app.graph.clear(); window.made = LiteGraph.createNode({json.dumps(kind)}); app.graph.add(window.made);"
        " app.extensionManager.command.execute('Comfy.Canvas.FitView')"
    )
    page.evaluate("new Promise(resolve => setTimeout(resolve, 500))")  # the upload widget sets its value a moment later
    return page.evaluate("Object.fromEntries(window.made.widgets.map(w => [w.name, w.value ?? null]))")


def test_a_new_node_has_no_source_and_no_broken_preview(page: Page) -> None:
    widgets = new_node(page, "LoadSubjectImages")
    assert (widgets["images"], widgets["folder"], widgets["sample"]) == ("", "", "none")
    assert (widgets["token"], widgets["resolution"], widgets["crop"]) == ("ohwx", 512, "center")
    assert page.evaluate("window.made.imgs?.length ?? 0") == 0


def test_a_seed_of_class_images_stays(page: Page) -> None:
    """A control that changes it after each run would make all of them anew each time."""
    assert "control_after_generate" not in new_node(page, "GenerateClassPriors")


def test_several_files_at_once_become_a_grid(page: Page, comfy: ComfyClient) -> None:
    new_node(page, "LoadSubjectImages")
    files = {}
    for name in ("chelsea", "coffee", "rocket"):
        buffer = io.BytesIO()
        Image.fromarray(getattr(data, name)()[:, :, :3]).save(buffer, "JPEG", quality=90)
        files[f"ui {name}.jpg"] = base64.b64encode(buffer.getvalue()).decode()
    # The button opens the system's file dialog; the files are put where it would put them.
    page.evaluate(
        "(() => {"
        f" const files = {json.dumps(files)}; const transfer = new DataTransfer();"
        " for (const [name, content] of Object.entries(files)) {"
        "  const bytes = Uint8Array.from(atob(content), c => c.charCodeAt(0));"
        "  transfer.items.add(new File([bytes], name, {type: 'image/jpeg'})); }"
        " const open = HTMLInputElement.prototype.click;"
        " HTMLInputElement.prototype.click = function () {"
        "  if (this.type !== 'file') return open.call(this);"
        "  window.multiple = this.multiple; this.files = transfer.files; this.dispatchEvent(new Event('change')); };"
        " window.made.widgets.find(w => w.type === 'button').callback();"
        " HTMLInputElement.prototype.click = open; })()"
    )
    value = page.wait_for("Array.isArray(window.made.widgets[0].value) && [...window.made.widgets[0].value]")
    assert page.evaluate("window.multiple") is True
    assert value == list(files)
    prompt = page.evaluate("app.graphToPrompt().then(p => JSON.parse(JSON.stringify(p.output)))")
    (node_id,) = prompt
    assert prompt[node_id]["inputs"]["images"] == {"__value__": value}
    page.evaluate("window.made.widgets.find(w => w.name === 'class_word').value = 'thing'")
    page.evaluate("window.made.widgets.find(w => w.name === 'resolution').value = 128")
    page.click("document.querySelector('[data-testid=\"queue-button\"]')")
    shown = page.wait_for(
        f"app.nodeOutputs['{node_id}']?.warnings && JSON.parse(JSON.stringify(app.nodeOutputs['{node_id}']))", 60
    )
    assert [record["type"] for record in shown["images"]] == ["temp"] * 3 and shown["warnings"] == []
    shown = "[...document.querySelectorAll('.sb-tile[data-photo] img')].filter(i => i.naturalWidth === 128)"
    page.wait_for(f"{shown}.length === 3", 30)  # in the panel, at the resolution that the run was made with
    # Front end 1.32.9 cannot draw a list of names by itself: the toasts it throws then are its errors.
    assert page.evaluate("document.querySelectorAll('.p-toast-message').length") == 0
    assert page.evaluate("window.made.widgets[0]._displayValue") == "3 photos: " + ", ".join(value)
    assert not [m for m in page.console if m.level == "exception"], page.console
    saved = page.evaluate("JSON.parse(JSON.stringify(app.graph.serialize()))")
    page.evaluate(f"app.loadGraphData({json.dumps(saved)})")
    again = page.evaluate("app.graphToPrompt().then(p => JSON.parse(JSON.stringify(p.output)))")
    assert next(iter(again.values()))["inputs"]["images"] == {"__value__": value}
