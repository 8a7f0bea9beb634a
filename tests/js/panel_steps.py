"""What tests do with the panels of a node alone in the real graph editor."""

from __future__ import annotations

import base64
import io
import json
import os
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import skimage.data
from PIL import Image, ImageFilter

from subjectbooth.tests.comfy_server import ComfyClient
from subjectbooth.tests.js.browser import OUT_OF_THE_WAY, READY, Browser, Page

USUAL = {**OUT_OF_THE_WAY, "Comfy.Locale": "en", "Comfy.VueNodes.Enabled": False}


def reload_with(comfy: ComfyClient, page: Page, **settings: Any) -> None:
    """The editor from its start, with these settings ("Comfy_Locale" for "Comfy.Locale")."""
    chosen = {**USUAL, **{name.replace("_", "."): value for name, value in settings.items()}}
    for setting, value in chosen.items():
        comfy.request("POST", f"/settings/{setting}", value)
    page.call("Page.navigate", url=comfy.url)
    time.sleep(0.5)
    page.wait_for(READY, 120)


@contextmanager
def usual_page(comfy: ComfyClient) -> Iterator[Page]:
    """An editor of its own, whose settings are as usual before and afterwards."""
    with Browser() as browser:
        reload_with(comfy, page := browser.open("about:blank"))
        yield page
        for setting, value in USUAL.items():
            comfy.request("POST", f"/settings/{setting}", value)


def add(page: Page, kind: str) -> None:
    """A new node alone in the graph, as the menu makes it, on the screen; `window.made` is it."""
    # Front end 1.49 keeps widget values by graph and node id, and forgets them only for a graph that has an id.
    page.evaluate("app.graph.clear(); app.graph.id = crypto.randomUUID(); 0")
    page.wait_for("!document.querySelector('[data-node-id]')")  # Nodes 2.0 would go on with a node of the same id
    page.evaluate(f"window.made = LiteGraph.createNode({json.dumps(kind)}); app.graph.add(made); 0")
    time.sleep(0.5)  # the upload widget sets its value a moment later
    show(page)


def show(page: Page) -> None:
    """`window.made` at the left border. (The editor's own "fit view" glides, and misses a node that still grows.)"""
    page.evaluate(
        "(ds => { ds.scale = 0.8; ds.offset[0] = 200 - made.pos[0]; ds.offset[1] = 200 - made.pos[1];"
        " app.canvas.setDirty(true, true); })(app.canvas.ds)"
    )


def set_widgets(page: Page, **values: Any) -> None:
    page.evaluate(
        f"for (const [name, value] of Object.entries({json.dumps(values)})) {{"
        " const widget = made.widgets.find(w => w.name === name); widget.value = value; widget.callback?.(value); }"
    )


def panel(page: Page, what: str) -> Any:
    """Something of the panel of `window.made`: `e` is its element."""
    return page.evaluate(f"(e => {what})(made.widgets.find(w => w.type.startsWith('SUBJECTBOOTH_')).element)")


def files(*names: str) -> str:
    """JavaScript for a DataTransfer with these photographs in it."""
    pictures = {}
    for name in names:
        picture = Image.fromarray(getattr(skimage.data, name.split("_")[0])()[:, :, :3])
        if name.endswith("_soft"):
            picture = picture.filter(ImageFilter.GaussianBlur(9))
        if name.endswith("_small"):
            picture = picture.crop((0, 0, 100, 100))
        buffer = io.BytesIO()
        picture.save(buffer, "JPEG", quality=90)
        pictures[f"panel {name}.jpg"] = base64.b64encode(buffer.getvalue()).decode()
    return (
        "(() => { const transfer = new DataTransfer();"
        f" for (const [name, content] of Object.entries({json.dumps(pictures)})) {{"
        "  const bytes = Uint8Array.from(atob(content), c => c.charCodeAt(0));"
        "  transfer.items.add(new File([bytes], name, {type: 'image/jpeg'})); } return transfer; })()"
    )


def value(page: Page) -> list[str]:
    return list(page.evaluate("[made.widgets.find(w => w.name === 'images').value].flat()"))


def tiles(page: Page, count: int) -> list[dict[str, Any]]:
    """The photos' tiles, as soon as they are those of the value and their pictures are loaded: name, mark, tooltip."""
    element = "made.widgets.find(w => w.type === 'SUBJECTBOOTH_PHOTOS').element"
    page.wait_for(
        f"(t => t.length === {count} && t.every(e => e.querySelector('img')?.naturalWidth > 0)"
        " && t.map(e => e.dataset.photo).join('|') === [made.widgets[0].value].flat().join('|'))"
        f"([...{element}.querySelectorAll('[data-photo]')])",
        60,
    )
    found: list[dict[str, Any]] = panel(
        page,
        "[...e.querySelectorAll('[data-photo]')].map(t => ({name: t.dataset.photo, title: t.title,"
        " mark: t.querySelector('.sb-mark')?.textContent ?? ''}))",
    )
    return found


def tool(page: Page, photo: int, name: str) -> str:
    return (
        "made.widgets.find(w => w.type === 'SUBJECTBOOTH_PHOTOS').element"
        f".querySelectorAll('[data-photo]')[{photo}].querySelector('[data-tool={name}]')"
    )


def ours(page: Page) -> list[Any]:
    """What the console has of the pack's scripts besides plain logs."""
    return [m for m in page.console if "/extensions/SubjectBooth/" in m.url + m.text and m.level not in ("log", "info")]


def keep_picture(page: Page, name: str) -> None:
    """For looking at: SUBJECTBOOTH_SCREENSHOTS names a folder."""
    if os.environ.get("SUBJECTBOOTH_SCREENSHOTS"):
        page.screenshot(Path(os.environ["SUBJECTBOOTH_SCREENSHOTS"]) / f"{name}.png")


def use_the_photo_panel(page: Page, name: str) -> None:
    """Drop, paste, move and remove photos with the mouse; the value that is saved and sent follows each time."""
    add(page, "LoadSubjectImages")
    set_widgets(page, class_word="cat", resolution=128)
    assert page.evaluate(f"made.onDragDrop({{dataTransfer: {files('chelsea', 'coffee_soft')}}})") is True
    tiles(page, 2)
    assert page.evaluate(f"made.pasteFiles({files('rocket_small')}.files)") is True
    shown = tiles(page, 3)
    names = value(page)
    assert len(names) == 3 and [tile["name"] for tile in shown] == names
    assert [tile["mark"] for tile in shown] == ["", "blurred", "small"]
    assert "looks blurred" in shown[1]["title"] and "100x100, smaller than" in shown[2]["title"]
    words = panel(page, "[...e.querySelectorAll('.sb-words')].map(w => w.textContent)")
    assert words == ["a photo of ohwx cat", "a photo of a cat"]
    keep_picture(page, name)
    page.click(tool(page, 0, "later"))
    page.wait_for(f"made.widgets[0].value[0] === {json.dumps(names[1])}", 10)
    assert value(page) == [names[1], names[0], names[2]]
    assert [tile["name"] for tile in tiles(page, 3)] == value(page)
    page.click(tool(page, 2, "remove"))
    page.wait_for("made.widgets[0].value.length === 2", 10)
    assert [tile["mark"] for tile in tiles(page, 2)] == ["blurred", ""]
    prompt = page.evaluate("app.graphToPrompt().then(p => JSON.parse(JSON.stringify(p.output)))")
    (sent,) = prompt.values()
    assert sent["inputs"]["images"] == {"__value__": [names[1], names[0]]}
    assert set(sent["inputs"]) == {
        "images", "folder", "sample", "class_word", "token", "prompt_template", "captions", "resolution", "crop",
        "photo_edits",
    }  # fmt: skip
    saved = page.evaluate("JSON.parse(JSON.stringify(app.graph.serialize().nodes[0].widgets_values))")
    assert saved == [[names[1], names[0]], "", "none", "cat", "ohwx", "a photo of {token} {class}", "template", 128,
                     "center", "", "image"]  # fmt: skip
