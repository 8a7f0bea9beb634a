"""The gallery in the real graph editor: empty, a run of this machine with its steps, sweep, sending, and deleting."""

from __future__ import annotations

import json
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from subjectbooth.tests.comfy_server import ComfyClient
from subjectbooth.tests.js.browser import Page, find_chromium
from subjectbooth.tests.js.panel_steps import keep_picture, ours, usual_page
from subjectbooth.tests.nodes.graphs import node
from subjectbooth.tests.nodes.training_graphs import train_node

pytestmark = [
    pytest.mark.comfy,
    pytest.mark.skipif(not find_chromium(), reason="no Chromium on this machine (CHROMIUM_PATH names one)"),
]
GALLERY = "document.querySelector('.subjectbooth-gallery')"


@pytest.fixture(scope="module")
def runs(_comfy_client: ComfyClient) -> Iterator[Path]:
    """The folder of runs, emptied for these tests: others have left theirs there."""
    assert _comfy_client.server is not None
    folder = _comfy_client.server.output_dir / "subjectbooth"
    aside = folder.with_name("subjectbooth_aside")
    if folder.exists():
        folder.rename(aside)
    yield folder
    shutil.rmtree(folder, ignore_errors=True)
    if aside.exists():
        aside.rename(folder)


@pytest.fixture(scope="module")
def page(_comfy_client: ComfyClient, runs: Path) -> Iterator[Page]:
    with usual_page(_comfy_client) as page:
        yield page


def open_tab(page: Page) -> None:
    page.evaluate("app.extensionManager.command.execute('Workspace.ToggleSidebarTab.subjectbooth-gallery')")
    page.wait_for(f"{GALLERY}?.offsetWidth")


def button(text: str) -> str:
    return f"[...{GALLERY}.querySelectorAll('button')].find(b => b.textContent.includes({json.dumps(text)}))"


def says(page: Page, text: str, timeout: float = 30) -> None:
    page.wait_for(f"{GALLERY}.innerText.includes({json.dumps(text)})", timeout)


def train(comfy: ComfyClient) -> dict[str, Any]:
    """A short run, trained without the browser; what the gallery's list says of it."""
    options = {**comfy.defaults("DreamBoothOptions"), "validation_steps": 1}
    subject = {**comfy.defaults("LoadSubjectImages"), "sample": "cat", "class_word": "cat", "resolution": 64}
    comfy.run(
        {
            "1": node("CheckpointLoaderSimple", ckpt_name="tiny15.safetensors"),
            "9": node("DreamBoothOptions", **options),
            "10": node("LoadSubjectImages", **subject),
            "11": train_node(
                steps=4, seed=3101, output_name="seen", validation_interval=2, options=["9", 0],
                validation_prompts="a photo of {subject}",
            ),
        }
    )  # fmt: skip
    (run,) = comfy.request("GET", "/subjectbooth/gallery")["runs"]
    return dict(run)


def test_the_gallery_from_empty_to_deleted(page: Page, comfy: ComfyClient, runs: Path) -> None:
    assert comfy.server is not None
    open_tab(page)
    says(page, "Nothing has been trained yet.")
    says(page, "will appear here")
    keep_picture(page, "gallery_empty")

    run = train(comfy)
    page.click(button("Refresh"))
    says(page, "ohwx cat")
    entry = f"{GALLERY}.querySelector('[data-run]')"
    said = page.evaluate(f"{entry}.innerText")
    assert said.startswith("seen\n") and "ohwx cat" in said
    assert "step 4" in said and "tiny15.safetensors" in said and "MB" in said
    page.wait_for(f"{entry}.querySelector('img').naturalWidth === 64")
    keep_picture(page, "gallery_list")

    # By keyboard: focus, Enter, and Escape back to the same entry.
    page.evaluate(f"{entry}.focus()")
    press_key(page, "Enter")
    says(page, "All runs")
    press_key(page, "Escape")
    page.wait_for(f"document.activeElement === {entry}")
    press_key(page, "Enter")
    pictures = f"[...{GALLERY}.querySelectorAll('.sbg-pictures img')]"
    page.wait_for(f"{pictures}[0]?.naturalWidth === 64")
    says(page, "step 4 · in use")
    slider = f"{GALLERY}.querySelector('input[type=range]')"
    page.evaluate(f"{slider}.value = '0'; {slider}.dispatchEvent(new Event('input'))")
    says(page, "step 2")
    page.wait_for(f"{pictures}[0].src.includes('step_000002_00.png') && {pictures}[0].naturalWidth === 64")
    nameless = page.evaluate(
        f"[...{GALLERY}.querySelectorAll('button, input, img')].filter(e => e.offsetWidth && !(e.textContent.trim()"
        " || e.getAttribute('aria-label') || e.alt)).length"
    )
    assert nameless == 0, "every control has a name"

    page.click(button("Use this step"))
    says(page, "models/loras/seen_step_2.safetensors is the LoRA of step 2.")
    assert (comfy.server.models_dir / "loras" / "seen_step_2.safetensors").is_file()

    page.evaluate("app.graph.clear(); 0")
    page.click(button("Send to Apply Subject LoRA"))
    says(page, "Added Apply Subject LoRA")
    apply = "app.graph.nodes.find(n => n.type === 'ApplySubjectLoRA')"
    assert page.evaluate(f"{apply}.widgets.find(w => w.name === 'lora_name').value") == "seen_step_2.safetensors"
    page.click(button("Send to Apply Subject LoRA"))
    says(page, "is chosen in Apply Subject LoRA")
    assert page.evaluate("app.graph.nodes.length") == 1
    page.evaluate("navigator.clipboard.writeText = async text => { window.copied = text; }")
    page.click(button("Copy words"))
    page.wait_for("window.copied === 'ohwx cat'")

    # The pictures of a sweep in fewer steps; it needs no graph.
    page.evaluate(
        "(ask => { app.api.fetchApi = (path, o) => { if (path === '/prompt') { const body = JSON.parse(o.body);"
        "  for (const n of Object.values(body.prompt)) if (n.class_type === 'KSampler') n.inputs.steps = 1;"
        "  o = {...o, body: JSON.stringify(body)}; } return ask(path, o); }; })(app.api.fetchApi.bind(app.api))"
    )
    page.click(button("Strength sweep"))
    swept = f"[...{GALLERY}.querySelectorAll('figure img')]"
    page.wait_for(f"{swept}.length === 6 && {swept}.every(i => i.naturalWidth === 64)", 120)
    strengths = page.evaluate(f"[...{GALLERY}.querySelectorAll('figcaption')].map(c => c.textContent)")
    assert strengths == ["0.00", "0.25", "0.50", "0.75", "1.00", "1.25"]
    says(page, "a photo of ohwx cat")
    page.evaluate(f"{GALLERY}.querySelector('figcaption').scrollIntoView()")
    keep_picture(page, "gallery_sweep")

    page.click(button("Show folder"))
    says(page, str(runs / run["run"]))
    page.click(button("Delete …"))
    says(page, "Delete this run? This frees")
    assert page.evaluate("document.activeElement.textContent") == "Keep"
    keep_picture(page, "gallery_delete")
    press_key(page, "Enter")
    page.wait_for(f"!{button('Delete for good')}")
    page.click(button("Delete …"))
    page.click(button("Delete for good"))
    says(page, "Nothing has been trained yet.")
    says(page, "Deleted ohwx cat")
    assert not (runs / run["run"]).exists()
    assert (comfy.server.models_dir / "loras" / "seen.safetensors").is_file()
    assert not ours(page)


def press_key(page: Page, key: str) -> None:
    code = {"Enter": 13, "Escape": 27, "Tab": 9}[key]
    text = {"text": "\r"} if key == "Enter" else {}
    page.call("Input.dispatchKeyEvent", type="keyDown", key=key, code=key, windowsVirtualKeyCode=code, **text)
    page.call("Input.dispatchKeyEvent", type="keyUp", key=key, code=key, windowsVirtualKeyCode=code)
