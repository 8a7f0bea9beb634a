"""The panels in the real graph editor, in both renderers and both languages, with the help pages and the templates."""

from __future__ import annotations

import base64
import io
import json
import os
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import skimage.data
from PIL import Image, ImageFilter

from subjectbooth.scripts.comfy_server import ComfyClient
from subjectbooth.tests.ui.browser import Browser, Page, find_chromium
from subjectbooth.tests.ui.test_editor import READY

ROOT = Path(__file__).resolve().parents[2]
NODES = sorted(path.name for path in (ROOT / "js" / "docs").iterdir())
pytestmark = [
    pytest.mark.comfy,
    pytest.mark.skipif(not find_chromium(), reason="no Chromium on this machine (CHROMIUM_PATH names one)"),
]
USUAL = {"Comfy.TutorialCompleted": True, "Comfy.Locale": "en", "Comfy.VueNodes.Enabled": False}
PANEL = {"LoadSubjectImages": "PHOTOS", "GenerateClassPriors": "CLASS_IMAGES", "ApplySubjectLoRA": "LORA"}


@pytest.fixture(scope="module")
def page(_comfy_client: ComfyClient) -> Iterator[Page]:
    with Browser() as browser:
        reload_with(_comfy_client, page := browser.open("about:blank"))
        yield page
        for setting, value in USUAL.items():
            _comfy_client.request("POST", f"/settings/{setting}", value)


def reload_with(comfy: ComfyClient, page: Page, **settings: Any) -> None:
    """The editor from its start, with these settings ("Comfy_Locale" for "Comfy.Locale")."""
    chosen = {**USUAL, **{name.replace("_", "."): value for name, value in settings.items()}}
    for setting, value in chosen.items():
        comfy.request("POST", f"/settings/{setting}", value)
    page.call("Page.navigate", url=comfy.url)
    time.sleep(0.5)
    page.wait_for(READY, 120)


def add(page: Page, kind: str) -> None:
    """A new node alone in the graph, as the menu makes it, on the screen; `window.made` is it."""
    page.evaluate("app.graph.clear()")
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
    }  # fmt: skip
    saved = page.evaluate("JSON.parse(JSON.stringify(app.graph.serialize().nodes[0].widgets_values))")
    assert saved == [[names[1], names[0]], "", "none", "cat", "ohwx", "a photo of {token} {class}", "template", 128,
                     "center", "image"]  # fmt: skip


def test_photos_are_dropped_pasted_moved_and_removed(page: Page) -> None:
    use_the_photo_panel(page, "photos")
    assert not ours(page)


def test_a_saved_workflow_shows_its_photos_again(page: Page) -> None:
    names = value(page)
    saved = page.evaluate("JSON.parse(JSON.stringify(app.graph.serialize()))")
    page.evaluate(f"app.loadGraphData({json.dumps(saved)}).then(() => {{ window.made = app.graph.nodes[0]; }})")
    assert [tile["name"] for tile in tiles(page, 2)] == names


def test_the_same_photo_twice_and_a_bad_token_are_said(page: Page) -> None:
    add(page, "LoadSubjectImages")
    set_widgets(page, class_word="cat", resolution=128, token="sks")
    page.evaluate(f"made.onDragDrop({{dataTransfer: {files('chelsea', 'chelsea_again')}}})")
    assert [tile["mark"] for tile in tiles(page, 2)] == ["twice", "twice"]
    notes = panel(page, "[...e.querySelectorAll('.sb-note')].map(n => n.textContent)")
    assert any("Only 2 photos" in note for note in notes) and any("rifle" in note for note in notes)
    set_widgets(page, class_word="")
    page.wait_for("[...document.querySelectorAll('.sb-note')].some(n => n.textContent.includes('class_word is empty'))")
    set_widgets(page, images="", folder="../elsewhere")
    page.wait_for("[...document.querySelectorAll('.sb-problem')].some(n => n.textContent.includes('leads out'))")


def test_class_images_come_and_a_click_leaves_one_out(page: Page, comfy: ComfyClient) -> None:
    page.evaluate(
        "(() => { const g = app.graph; g.clear(); const add = (type, values) => { const n = LiteGraph.createNode(type);"
        "  g.add(n); for (const w of n.widgets ?? []) if (w.name in values) w.value = values[w.name]; return n; };"
        " const wire = (a, slot, b, name) => a.connect(slot, b, b.inputs.findIndex(i => i.name === name));"
        " const base = add('CheckpointLoaderSimple', {ckpt_name: 'tiny15.safetensors'});"
        " const photos = add('LoadSubjectImages', {sample: 'cat', class_word: 'cat', resolution: 64});"
        " window.made = add('GenerateClassPriors', {count: 3, steps: 1, batch_size: 2, seed: 4711});"
        " wire(base, 0, made, 'model'); wire(base, 1, made, 'clip'); wire(base, 2, made, 'vae');"
        " wire(photos, 0, made, 'subject'); g.arrange?.(); window.batches = [];"
        " app.api.addEventListener('subjectbooth.class_images', e => window.batches.push(e.detail.pictures.length));"
        " window.output = null; app.api.addEventListener('executed',"
        "  e => { if (String(e.detail.node) === String(made.id)) window.output = e.detail.output; }); })()"
    )
    show(page)
    page.click("document.querySelector('[data-testid=\"queue-button\"]')")
    element = "made.widgets.find(w => w.type === 'SUBJECTBOOTH_CLASS_IMAGES').element"
    page.wait_for("window.output?.hashes || app.lastExecutionError", 240)
    assert page.evaluate("window.batches") == [0, 2, 1], "what was there, then each batch as it was done"
    buttons = f"[...{element}.querySelectorAll('button')]"
    hashes = page.wait_for(f"(t => t.length === 3 && t.map(e => e.dataset.hash))({buttons})")
    assert sorted(hashes) == sorted(h[:32] for h in page.evaluate("window.output.hashes"))
    assert "3 of 3 there, 3 made now" in panel(page, "e.textContent")
    keep_picture(page, "class_images")
    page.click(f"{buttons}[1]")
    assert page.evaluate("made.widgets.find(w => w.name === 'exclude').value") == hashes[1][:12]
    assert "1 left out" in panel(page, "e.textContent")
    page.click("document.querySelector('[data-testid=\"queue-button\"]')")
    page.wait_for("window.output.excluded_hashes?.length === 1", 120)
    assert page.evaluate("window.output.excluded_hashes[0]").startswith(hashes[1])
    page.wait_for(f"{element}.textContent.includes('0 made now')")
    assert panel(page, "[...e.querySelectorAll('button')].map(b => b.getAttribute('aria-pressed'))") == [
        "false", "true", "false",
    ]  # fmt: skip
    # Opened again, without any output of a run: the folder that the node remembers fills the panel.
    saved = page.evaluate("JSON.parse(JSON.stringify(app.graph.serialize()))")
    page.evaluate(
        f"app.nodeOutputs = {{}}; app.loadGraphData({json.dumps(saved)}).then(() => {{"
        " window.made = app.graph.nodes.find(n => n.type === 'GenerateClassPriors'); })"
    )
    page.wait_for(f"{element}.textContent.includes('3 kept from before')")
    assert panel(page, "e.querySelectorAll('.sb-out').length") == 1
    assert not ours(page)


def test_a_lora_trained_meanwhile_is_in_the_list_with_its_words(page: Page, comfy: ComfyClient) -> None:
    import torch

    from subjectbooth.trainer.safefile import to_bytes

    assert comfy.server is not None
    words = {"subjectbooth.trigger": "ohwx panda", "modelspec.trigger_phrase": "ohwx panda", "ss_network_dim": "8"}
    content = to_bytes({"lora_unet_x.alpha": torch.ones(())}, words)
    (comfy.server.models_dir / "loras" / "panel_new.safetensors").write_bytes(content)
    (comfy.server.models_dir / "loras" / "panel_mute.safetensors").write_bytes(
        to_bytes({"lora_unet_x.alpha": torch.ones(())}, {})
    )
    add(page, "ApplySubjectLoRA")
    page.wait_for("made.widgets[0].options.values.includes('panel_new.safetensors')")
    set_widgets(page, lora_name="panel_new.safetensors")
    page.wait_for("document.querySelector('.sb-words')?.textContent === 'ohwx panda'")
    page.evaluate("navigator.clipboard.writeText = async text => { window.copied = text; }")
    page.click("[...document.querySelectorAll('.sb-panel .sb-button')].at(-1)")
    page.wait_for("window.copied === 'ohwx panda'")
    keep_picture(page, "lora")
    set_widgets(page, lora_name="panel_mute.safetensors")
    page.wait_for("document.body.textContent.includes('does not say its trigger words')")
    assert not ours(page)


def close_dialog(page: Page) -> None:
    """It lies over everything that a test might click next."""
    closer = "document.querySelector('.p-dialog-close-button')"
    if page.evaluate(f"!!{closer}"):
        page.click(closer)
    else:  # front end 1.58
        for kind in ("keyDown", "keyUp"):
            page.call("Input.dispatchKeyEvent", type=kind, key="Escape", code="Escape", windowsVirtualKeyCode=27)
    page.wait_for("!document.querySelector('[role=dialog]')", 20)


def test_the_templates_are_listed_with_pictures_and_open(page: Page) -> None:
    names = sorted(path.stem for path in (ROOT / "example_workflows").glob("*.json"))
    listed = page.evaluate("fetch('/api/workflow_templates').then(r => r.json())")
    assert sorted(listed["SubjectBooth"]) == names
    page.evaluate("void app.extensionManager.command.execute('Comfy.BrowseTemplates')")
    entry = "[...document.querySelectorAll('[role=dialog] [role=button], [role=dialog] li, [role=dialog] button')]"
    page.click(f"{entry}.find(e => e.textContent.trim() === 'SubjectBooth')")
    page.wait_for(f"{json.dumps(names)}.every(n => document.querySelector('[role=dialog]').textContent.includes(n))")
    pictures = "[...document.querySelectorAll('[role=dialog] img')]"
    page.wait_for(f"{pictures}.length === {len(names)} && {pictures}.every(i => i.naturalWidth > 0)", 30)
    keep_picture(page, "templates")
    heading = "[...document.querySelectorAll('[role=dialog] h3')]"
    page.click(f"{heading}.find(e => e.textContent.trim() === 'use_a_trained_lora')")
    page.wait_for("app.graph.nodes.some(n => n.type === 'ApplySubjectLoRA')")
    page.wait_for("!document.querySelector('[role=dialog]')")
    assert page.evaluate("document.querySelectorAll('.p-toast-message').length") == 0


def test_the_box_for_photos_in_picture_out(page: Page, comfy: ComfyClient) -> None:
    """The blueprint is served, was taken without a message at start-up, and stands for the four nodes and a sampler."""
    served = comfy.request("GET", "/global_subgraphs")
    entries = {entry["name"]: key for key, entry in served.items() if "SubjectBooth" in entry["info"]["node_pack"]}
    ((name, key),) = entries.items()
    blueprint = json.loads(comfy.request("GET", f"/global_subgraphs/{key}")["data"])
    assert blueprint == json.loads((ROOT / "subgraphs" / f"{name}.json").read_text("utf-8"))
    assert not [m for m in page.console if "subgraph blueprint" in m.text]
    page.evaluate(f"app.loadGraphData({json.dumps(blueprint)}).then(() => 1)")
    prompt = page.evaluate("app.graphToPrompt().then(p => JSON.parse(JSON.stringify(p.output)))")
    kinds = sorted(node["class_type"] for node in prompt.values())
    assert kinds == sorted(
        ["LoadSubjectImages", "GenerateClassPriors", "DreamBoothLoRATrain", "ApplySubjectLoRA", "CLIPTextEncode",
         "CLIPTextEncode", "EmptyLatentImage", "KSampler", "VAEDecode"]
    )  # fmt: skip
    by_kind = {node["class_type"]: node["inputs"] for node in prompt.values()}
    assert by_kind["LoadSubjectImages"]["class_word"] == "dog" and by_kind["LoadSubjectImages"]["resolution"] == 512
    assert by_kind["EmptyLatentImage"]["width"] == 512 and by_kind["DreamBoothLoRATrain"]["steps"] == 500
    box = page.evaluate("(n => [n.inputs.map(i => i.name), n.outputs.map(o => o.type)])(app.graph.nodes[0])")
    assert {"image", "model", "clip", "vae"} <= set(box[0]) and box[1] == ["IMAGE"]
    keep_picture(page, "blueprint")


def test_settings_are_under_one_heading_and_the_badge_is_there(page: Page) -> None:
    ids = page.evaluate("Object.keys(app.ui.settings.settingsLookup).filter(id => id.startsWith('SubjectBooth'))")
    assert sorted(ids) == [f"SubjectBooth.Panels.{name}" for name in ("ClassImages", "Loras", "Photos")]
    page.evaluate("app.extensionManager.setting.set('SubjectBooth.Panels.Photos', false)")
    add(page, "LoadSubjectImages")
    assert page.evaluate("made.widgets.some(w => w.type === 'SUBJECTBOOTH_PHOTOS')") is False
    page.evaluate("app.extensionManager.setting.set('SubjectBooth.Panels.Photos', true)")
    add(page, "LoadSubjectImages")
    assert page.evaluate("made.widgets.some(w => w.type === 'SUBJECTBOOTH_PHOTOS')") is True
    page.evaluate("app.extensionManager.command.execute('Comfy.ShowSettingsDialog')")
    entries = "[...document.querySelectorAll('[role=dialog] :is(li, [role=option], [role=button])')]"
    page.click(f"{entries}.find(e => e.textContent.trim() === 'About')")
    page.wait_for("document.querySelector('a[href=\"https://github.com/subjectbooth/SubjectBooth\"]')", 20)
    keep_picture(page, "about")
    close_dialog(page)


@pytest.mark.parametrize("language", ["en", "ru"])
def test_help_pages_open_with_their_picture(page: Page, comfy: ComfyClient, language: str) -> None:
    """In Russian the titles and the panels' words are Russian too."""
    if language != "en":
        reload_with(comfy, page, Comfy_Locale=language)
    words = json.loads((ROOT / "locales" / language / "nodeDefs.json").read_text("utf-8"))
    for kind in NODES:
        add(page, kind)
        assert page.evaluate("made.title") == words[kind]["display_name"]
        labels = page.evaluate("Object.fromEntries((made.widgets ?? []).map(w => [w.name, w.label ?? w.name]))")
        for name, entry in words[kind].get("inputs", {}).items():
            assert labels.get(name, entry["name"]) == entry["name"], (kind, name)
        page.evaluate("app.canvas.deselectAll?.(); app.canvas.selectNode(made)")
        open_help(page)
        heading = (ROOT / "js" / "docs" / kind / f"{language}.md").read_text("utf-8").splitlines()[0].lstrip("# ")
        headings = "[...document.querySelectorAll('.node-help-content h1')]"
        page.wait_for(f"{headings}.some(h => h.textContent === '{heading}')")
        picture = f"i.src.endsWith('/{kind}/node.jpg') && i.naturalWidth > 0"
        page.wait_for(f"[...document.querySelectorAll('.node-help-content img')].some(i => {picture})")
    keep_picture(page, f"help_{language}")
    add(page, "LoadSubjectImages")
    page.wait_for("document.querySelector('.sb-add')")
    assert ("фото" in panel(page, "e.textContent")) is (language == "ru")
    assert not ours(page)


def open_help(page: Page) -> None:
    # Not with the mouse: the tool box may lie above the window's border, depending on where the node is.
    button = "document.querySelector('[data-testid=\"info-button\"]')"
    page.wait_for(f"!!{button}", 30)
    page.evaluate(f"{button}.click()")


def test_the_panels_work_in_the_other_renderer(page: Page, comfy: ComfyClient) -> None:
    reload_with(comfy, page, Comfy_VueNodes_Enabled=True)
    page.wait_for("window.LiteGraph.vueNodesMode === true")
    use_the_photo_panel(page, "photos_vue")
    for kind, name in PANEL.items():
        add(page, kind)
        element = f"made.widgets.find(w => w.type === 'SUBJECTBOOTH_{name}').element"
        page.wait_for(f"(b => b.width > 100 && b.height > 15)({element}.getBoundingClientRect())", 20)
        assert page.evaluate(f"!!{element}.closest('[data-node-id]')"), "inside the node, not above the canvas"
    assert not ours(page)
