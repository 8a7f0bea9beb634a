"""The panels in the real graph editor, in both renderers and both languages, with the help pages and the templates."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path

import pytest
from PIL import Image

from subjectbooth.tests.comfy_server import ComfyClient
from subjectbooth.tests.js.browser import Page, find_chromium
from subjectbooth.tests.js.panel_steps import (
    add,
    files,
    keep_picture,
    ours,
    panel,
    reload_with,
    set_widgets,
    show,
    tiles,
    tool,
    use_the_photo_panel,
    usual_page,
    value,
)

ROOT = Path(__file__).resolve().parents[2]
NODES = sorted(path.name for path in (ROOT / "js" / "docs").iterdir())
pytestmark = [
    pytest.mark.comfy,
    pytest.mark.skipif(not find_chromium(), reason="no Chromium on this machine (CHROMIUM_PATH names one)"),
]
CUT_OFF = """[...document.querySelectorAll('[data-node-id] *')].filter(e => !e.children.length && e.textContent.trim()
  && getComputedStyle(e).textOverflow === 'ellipsis' && e.scrollWidth > e.clientWidth).map(e => e.textContent)"""
PANEL = {"LoadSubjectImages": "PHOTOS", "GenerateClassPriors": "CLASS_IMAGES", "ApplySubjectLoRA": "LORA"}


@pytest.fixture(scope="module")
def page(_comfy_client: ComfyClient) -> Iterator[Page]:
    with usual_page(_comfy_client) as page:
        yield page


def test_photos_are_dropped_pasted_moved_and_removed(page: Page) -> None:
    use_the_photo_panel(page, "photos")
    assert not ours(page)


def test_a_saved_workflow_shows_its_photos_again(page: Page) -> None:
    names = value(page)
    saved = page.evaluate("JSON.parse(JSON.stringify(app.graph.serialize()))")
    page.evaluate(f"app.loadGraphData({json.dumps(saved)}).then(() => {{ window.made = app.graph.nodes[0]; }})")
    assert [tile["name"] for tile in tiles(page, 2)] == names


def test_a_photo_is_cropped_by_hand_and_captioned(page: Page) -> None:
    add(page, "LoadSubjectImages")
    set_widgets(page, class_word="cat", resolution=128)
    page.evaluate(f"made.onDragDrop({{dataTransfer: {files('chelsea', 'coffee')}}})")
    tiles(page, 2)
    first, second = value(page)
    edits = "JSON.parse(made.widgets.find(w => w.name === 'photo_edits').value || '{}')"
    photo = f"document.querySelector('[data-photo={json.dumps(first)}]')"
    whole = page.evaluate(f"{photo}.querySelector('img').src")

    page.click(f"{photo}.querySelector('img')")
    box = "document.querySelector('.sb-crop-box')"
    page.wait_for(f"{box}?.offsetWidth && document.querySelector('.sb-crop img').naturalWidth === 451")
    keep_picture(page, "crop_open")
    x, y, width, height = page.evaluate(
        f"(b => [b.x + b.width / 2, b.y + b.height / 2, b.width, b.height])({box}.getBoundingClientRect())"
    )
    image = page.evaluate("document.querySelector('.sb-crop img').getBoundingClientRect().width")
    assert abs(width - height) < 2, "the whole height"
    for kind, left in (("mousePressed", 0), ("mouseMoved", -20), ("mouseMoved", -30), ("mouseReleased", -30)):
        page.call("Input.dispatchMouseEvent", type=kind, button="left", buttons=1, clickCount=1, x=x + left, y=y)
    crop = page.wait_for(f"{edits}[{json.dumps(first)}]?.crop")
    assert abs(crop[0] - (0.5 - 30 / image)) < 0.01 and crop[1:] == [0.5, 1]
    page.evaluate(f"{box}.focus()")
    for key in ("-", "-", "ArrowRight"):
        for kind in ("keyDown", "keyUp"):
            page.call("Input.dispatchKeyEvent", type=kind, key=key)
    page.wait_for(f"{edits}[{json.dumps(first)}].crop[2] === 0.98")
    assert page.evaluate(f"{edits}[{json.dumps(first)}].crop[0]") > crop[0]
    assert page.evaluate("app.graph.nodes.length") == 1, "keys are not the editor's"
    page.click("[...document.querySelectorAll('.sb-crop-line button')].at(-1)")
    page.wait_for(
        f"{photo}?.classList.contains('sb-cropped') && {photo}.querySelector('img').src !== {json.dumps(whole)}"
    )

    caption = f"document.querySelector('[data-focus=\"caption {second}\"]')"
    page.evaluate(f"{caption}.focus()")
    page.call("Input.insertText", text="a {token} cup")
    page.evaluate(f"{caption}.blur()")
    page.wait_for("[...document.querySelectorAll('.sb-words')].some(w => w.textContent === 'a ohwx cup')")
    keep_picture(page, "crop_and_caption")
    nameless = page.evaluate(
        "[...document.querySelectorAll('.sb-panel :is(button, input, [tabindex])')].filter(e => e.offsetWidth"
        " && !(e.getAttribute('aria-label') || e.title || e.textContent.trim())).length"
    )
    assert nameless == 0, "every control has a name"

    sent = page.evaluate("app.graphToPrompt().then(p => JSON.parse(JSON.stringify(p.output)))")
    (inputs,) = (made["inputs"] for made in sent.values())
    wanted = json.loads(inputs["photo_edits"])
    assert set(wanted[first]) == {"crop"} and wanted[second] == {"caption": "a {token} cup"}
    saved = page.evaluate("JSON.parse(JSON.stringify(app.graph.serialize()))")
    page.evaluate(f"app.loadGraphData({json.dumps(saved)}).then(() => {{ window.made = app.graph.nodes[0]; }})")
    tiles(page, 2)
    page.wait_for(f"{photo}.classList.contains('sb-cropped') && {caption}.value === 'a {{token}} cup'")
    page.click(tool(page, 1, "remove"))
    page.wait_for(f"Object.keys({edits}).join() === {json.dumps(first)}")
    page.click(f"{photo}.querySelector('img')")
    page.click("[...document.querySelectorAll('.sb-crop-line button')].find(b => b.textContent === 'Reset crop')")
    page.wait_for("made.widgets.find(w => w.name === 'photo_edits').value === ''")
    assert not ours(page)


def test_a_mask_is_painted_in_comfyuis_own_editor(page: Page, comfy: ComfyClient) -> None:
    """It opens from the panel, what is saved there is the photo's mask, and nothing of it stays in the graph."""
    assert comfy.server is not None
    add(page, "LoadSubjectImages")
    set_widgets(page, class_word="cat", resolution=128)
    page.evaluate(f"made.onDragDrop({{dataTransfer: {files('chelsea')}}})")
    tiles(page, 1)
    (name,) = value(page)
    edits = "JSON.parse(made.widgets.find(w => w.name === 'photo_edits').value || '{}')"
    photo = f"document.querySelector('[data-photo={json.dumps(name)}]')"
    line = "[...document.querySelectorAll('.sb-crop-line button')].find(b => b.textContent === '{}')".format
    dialog = "[...document.querySelectorAll('[role=dialog] button')].find(b => b.textContent.trim() === '{}')".format
    page.click(f"{photo}.querySelector('img')")
    page.wait_for(f"document.activeElement.classList.contains('sb-crop-box') && {line('Paint mask')}")
    page.click(line("Paint mask"))
    page.click(dialog("Cancel"))
    page.wait_for(f"app.graph.nodes.length === 1 && document.activeElement === {line('Paint mask')}")
    assert page.evaluate(edits) == {}
    page.click(line("Paint mask"))
    page.click(dialog("Invert"))  # nothing is painted yet, so now everything is
    keep_picture(page, "mask_editor")
    page.click(dialog("Save"))
    mask = page.wait_for(f"{edits}[{json.dumps(name)}]?.mask")
    painted = Image.open(comfy.server.input_dir / mask.removesuffix(" [input]"))
    assert painted.size == (451, 300) and painted.getchannel("A").getextrema() == (0, 0)
    page.wait_for(f"{line('Change mask')} && {line('Remove mask')} && app.graph.nodes.length === 1")
    keep_picture(page, "mask_painted")
    page.click(line("Done"))
    page.wait_for(f"{photo}?.classList.contains('sb-masked')")
    page.wait_for("document.querySelector('.sb-panel').textContent.includes('Masks take effect with masked_loss')")
    page.click(f"{photo}.querySelector('img')")
    page.click(line("Remove mask"))
    page.wait_for(f"{line('Paint mask')} && !{line('Remove mask')} && !{edits}[{json.dumps(name)}]")
    page.click(line("Done"))
    # Undo leads back over the mask, and knows nothing of the node that the editor was given.
    masks = []
    for _ in range(6):
        kinds = page.evaluate("app.graph.nodes.map(n => n.type)")
        if "LoadSubjectImages" not in kinds:  # before this test
            break
        assert kinds == ["LoadSubjectImages"]
        edited = "app.graph.nodes[0]?.widgets.find(w => w.name === 'photo_edits').value ?? ''"
        masks.append(page.evaluate(f"({edited}).includes({json.dumps(mask)})"))
        page.evaluate("app.extensionManager.command.execute('Comfy.Undo')")
    assert masks[0] is False and True in masks and masks[-1] is False, masks
    assert not ours(page)


def test_the_same_photo_twice_and_a_bad_token_are_said(page: Page) -> None:
    add(page, "LoadSubjectImages")
    set_widgets(page, class_word="cat", resolution=128, token="sks")
    page.evaluate(f"made.onDragDrop({{dataTransfer: {files('chelsea', 'chelsea_again')}}})")
    assert [tile["mark"] for tile in tiles(page, 2)] == ["similar", "similar"]
    notes = panel(page, "[...e.querySelectorAll('.sb-note')].map(n => n.textContent)")
    assert any("Only 2 photos" in note for note in notes) and any("rifle" in note for note in notes)
    set_widgets(page, class_word="")
    page.wait_for("[...document.querySelectorAll('.sb-note')].some(n => n.textContent.includes('class_word is empty'))")
    set_widgets(page, images="", folder="../elsewhere")
    page.wait_for("[...document.querySelectorAll('.sb-problem')].some(n => n.textContent.includes('leads out'))")


def test_class_images_come_and_a_click_leaves_one_out(page: Page, comfy: ComfyClient) -> None:
    page.evaluate(
        "(() => { const g = app.graph; g.clear(); g.id = crypto.randomUUID();"
        " const add = (type, values) => { const n = LiteGraph.createNode(type);"
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
    assert "3 of 3 class images ready (3 new)" in panel(page, "e.textContent")
    page.wait_for("!made.widgets.some(w => w.name === '$$node-text-preview')", 10)  # the panel says the same
    keep_picture(page, "class_images")
    page.click(f"{buttons}[1]")
    assert page.evaluate("made.widgets.find(w => w.name === 'exclude').value") == hashes[1][:12]
    assert "1 excluded" in panel(page, "e.textContent")
    page.click("document.querySelector('[data-testid=\"queue-button\"]')")
    page.wait_for("window.output.excluded_hashes?.length === 1", 120)
    assert page.evaluate("window.output.excluded_hashes[0]").startswith(hashes[1])
    page.wait_for(f"{element}.textContent.includes('(0 new)')")
    assert panel(page, "[...e.querySelectorAll('button')].map(b => b.getAttribute('aria-pressed'))") == [
        "false", "true", "false",
    ]  # fmt: skip
    # Opened again, without any output of a run: the folder that the browser remembers fills the panel, as a reload may
    # bring back the workflow of before the run.
    saved = page.evaluate("JSON.parse(JSON.stringify(app.graph.serialize()))")
    for node in saved["nodes"]:
        node["properties"].pop("class_images", None)
    page.evaluate(
        f"app.nodeOutputs = {{}}; app.loadGraphData({json.dumps(saved)}).then(() => {{"
        " window.made = app.graph.nodes.find(n => n.type === 'GenerateClassPriors'); })"
    )
    page.wait_for(f"{element}.textContent.includes('3 class images from an earlier run')")
    assert panel(page, "e.querySelectorAll('.sb-out').length") == 1
    assert not ours(page)


def test_a_lora_trained_meanwhile_is_in_the_list_with_its_words(page: Page, comfy: ComfyClient) -> None:
    import torch

    from subjectbooth.trainer.files.safetensors_file import to_bytes

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
    page.wait_for("document.body.textContent.includes('does not contain its trigger words')")
    assert not ours(page)


def test_a_preset_fills_the_node_and_an_edit_ends_it(page: Page) -> None:
    """And what few people change is folded away, with a button that brings it back."""
    add(page, "DreamBoothLoRATrain")
    values = "Object.fromEntries(made.widgets.map(w => [w.name, w.value]))"
    set_widgets(page, preset="face")
    filled = page.evaluate(values)
    assert (filled["steps"], filled["rank"], filled["network_alpha"], filled["learning_rate"]) == (1000, 32, 32, 1e-4)
    set_widgets(page, steps=900)
    edited = page.evaluate(values)
    assert (edited["preset"], edited["steps"], edited["rank"]) == ("custom", 900, 32)
    in_sight = (
        "made.widgets.filter(w => w.type !== 'SUBJECTBOOTH_TRAINING' && made.isWidgetVisible(w)).map(w => w.name)"
    )
    shown = page.evaluate(in_sight)
    assert sorted(shown) == sorted(
        ["steps", "learning_rate", "rank", "output_name", "validation_prompts", "preservation", "preset",
         "more settings"]
    )  # fmt: skip
    rows = "['rank', 'output_name'].map(name => made.widgets.find(w => w.name === name).y)"
    page.wait_for(f"(([above, below]) => below - above === 24)({rows})", 10)  # what is folded away leaves no gap
    low = page.evaluate("made.size[1]")
    page.evaluate("made.widgets.find(w => w.name === 'more settings').callback()")
    assert {"seed", "precision", "use_step"} <= set(page.evaluate(in_sight))
    assert page.evaluate("made.size[1]") > low
    saved = page.evaluate("JSON.parse(JSON.stringify(app.graph.serialize().nodes[0].widgets_values))")
    assert saved[-1] == "custom" and saved[0] == 900, "the button has no value in a workflow"
    assert not ours(page)


def test_the_browser_notifies_of_a_training_that_ends_in_a_hidden_tab(page: Page, comfy: ComfyClient) -> None:
    """With Chromium's own notifications, which say that they were shown."""
    page.call("Browser.grantPermissions", permissions=["notifications"], origin=comfy.url)
    page.evaluate(
        "window.notices = []; window.Notification = class extends Notification { constructor(...given) {"
        " super(...given); this.addEventListener('show', () => notices.push([this.title, this.body, this.tag])); } };"
        " window.send = (run, state, series) => app.api.dispatchEvent(new CustomEvent('subjectbooth.train', {detail: {"
        "  node: '1', run: `${run}_0123456789ab`, state, step: 4, steps: 4, series, result: {trigger: run}}})); 0"
    )
    trained = json.dumps({"loss": [[1, 0.5]]})
    page.evaluate(f"send('seen', 'training', {trained}); send('seen', 'finished', {{}})")
    with page.covered():
        page.wait_for("document.hidden")
        page.evaluate(f"send('ohwx dog', 'training', {trained}); send('ohwx dog', 'finished', {{}})")
        page.evaluate("send('reused', 'finished', {})")
        shown = page.wait_for("notices.length && notices", 10)
    assert shown == [["ohwx dog: Finished", "step 4 / 4", "ohwx dog_0123456789ab"]]
    page.wait_for("!document.hidden")
    assert not ours(page)


def test_the_search_finds_the_nodes_by_what_people_type(page: Page, comfy: ComfyClient) -> None:
    """In the search box itself. A front end that knows aliases gets them, whatever ComfyUI it is on; 1.32 only has the
    names."""
    aliases = page.evaluate("LiteGraph.registered_node_types.LoadSubjectImages.nodeData.search_aliases ?? null")
    assert aliases and {"face", "training", "fine-tune"} <= set(aliases)
    page.evaluate("app.graph.clear(); 0")
    page.evaluate("app.extensionManager.command.execute('Workspace.SearchBox.Toggle')")
    box = "[...document.querySelectorAll('[role=dialog] input, .comfy-vue-node-search-container input')]"
    page.wait_for(f"(e => e && (e.focus(), 1))({box}.find(e => e.offsetWidth))")
    found = "[...document.querySelectorAll('[role=option], [data-testid*=result]')].map(e => e.innerText.trim())"
    photos, trainer, apply = "Load Subject Images", "DreamBooth LoRA Training", "Apply Subject LoRA"
    knows_aliases = not page.evaluate("!!document.querySelector('.comfy-vue-node-search-container')")
    words = [("training", trainer, []), ("dreambooth", trainer, [photos, apply, "Generate Class Priors"])]
    if knows_aliases:
        words += [("face", photos, []), ("photos", photos, []), ("fine-tune", trainer, [])]
    for typed, wanted, others in words:
        page.evaluate("document.activeElement.select()")
        page.call("Input.insertText", text=typed)
        page.wait_for(f"{json.dumps([wanted, *others])}.every(name => {found}.some(e => e.startsWith(name)))", 20)
        keep_picture(page, f"search_{typed}")
    for kind in ("keyDown", "keyUp"):
        page.call("Input.dispatchKeyEvent", type=kind, key="Escape", code="Escape", windowsVirtualKeyCode=27)
    page.wait_for("!document.querySelector('.comfy-vue-node-search-container input, [role=dialog] input')?.offsetWidth")
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
    # A picture is put there when its place comes into view.
    heading = "[...document.querySelectorAll('[role=dialog] h3')]"
    page.evaluate(f"{heading}.forEach(e => e.scrollIntoView())")
    page.wait_for(f"{pictures}.length === {len(names)}")
    page.wait_for(f"{pictures}.every(i => i.naturalWidth > 0)")
    keep_picture(page, "templates")
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
    assert by_kind["LoadSubjectImages"]["class_word"] == "" and by_kind["LoadSubjectImages"]["resolution"] == 512
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
    about = (
        "[...document.querySelectorAll('[role=dialog] :is(li, [role=option], [role=button])')]"
        ".find(e => e.textContent.trim() === 'About')"
    )
    for attempts_left in reversed(range(2)):
        page.wait_for(f"(e => e && (e.scrollIntoView(), true))({about})")  # the list may be longer than the dialog
        # While the dialog is still coming up it takes a click and does nothing.
        page.click(about)
        try:
            page.wait_for("document.querySelector('a[href=\"https://github.com/subjectbooth/SubjectBooth\"]')", 10)
            break
        except TimeoutError:
            if not attempts_left:
                raise
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
    for values, russian in (
        ({"folder": "pets", "sample": "cat"}, "Фото взяты из нескольких мест (2)"),
        ({"folder": "", "sample": "none", "images": "gone.png"}, "Файла 'gone.png' нет в папке input"),
        ({"images": ""}, "+ фото"),
    ):
        if language == "ru":
            set_widgets(page, **values)
            page.wait_for(f"document.querySelector('.sb-panel')?.textContent.includes({json.dumps(russian)})", 10)
    page.wait_for("document.querySelector('.sb-add')")
    assert ("фото" in panel(page, "e.textContent")) is (language == "ru")
    gallery = "app.extensionManager.command.execute('Workspace.ToggleSidebarTab.subjectbooth-gallery')"
    page.evaluate(gallery)
    heading = "Обучения" if language == "ru" else "Runs"
    page.wait_for(f"document.querySelector('.subjectbooth-gallery h2')?.textContent === {json.dumps(heading)}")
    keep_picture(page, f"gallery_{language}")
    page.evaluate(gallery)
    template = json.loads((ROOT / "example_workflows" / "use_a_trained_lora.json").read_text("utf-8"))
    chosen = next(node for node in template["nodes"] if node["type"] == "ApplySubjectLoRA")["widgets_values"]
    chosen[0] = "gone.safetensors"
    page.evaluate(f"app.loadGraphData({json.dumps(template)}).then(() => 1)")
    page.evaluate("app.extensionManager.command.execute('Comfy.Canvas.FitView')")
    note = "Рисует с LoRA, обученной раньше" if language == "ru" else "Draws with a LoRA that was trained before"
    page.wait_for(f"[...document.querySelectorAll('.dom-widget')].some(e => e.innerText.includes({json.dumps(note)}))")
    missing = "Файл lora 'gone.safetensors' не найден" if language == "ru" else "'gone.safetensors' was not found"
    page.wait_for(f"document.querySelector('.sb-problem')?.textContent.includes({json.dumps(missing)})")
    slots = page.evaluate("app.graph.nodes.find(n => n.subgraph).inputs.map(i => i.localized_name ?? i.name)")
    assert slots == (["модель", "clip", "vae", "промпт"] if language == "ru" else ["model", "clip", "vae", "prompt"])
    keep_picture(page, f"template_{language}")
    assert not [m for m in ours(page) if "/lora?name=" not in m.url], "the template's LoRA is not there"


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
    for kind in NODES:
        add(page, kind)
        page.wait_for("document.querySelector('[data-node-id]')")
        assert page.evaluate(CUT_OFF) == [], kind
        if kind == "DreamBoothLoRATrain":
            lines = "document.querySelector('[data-node-id] textarea').offsetHeight"
            page.wait_for(f"{lines} < 160", 10)  # no room for what is folded away
            assert 0.0001 in page.evaluate("[...document.querySelectorAll('[data-node-id] input')].map(e => +e.value)")
    assert not ours(page)
