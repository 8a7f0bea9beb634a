"""Make all pictures of the example workflows anew, in a real ComfyUI and a real browser; needs chromium.

    python scripts/make_examples.py                     every example, run to its end
    python scripts/make_examples.py train_only --quick  one of them with a few steps, to try this program
    python scripts/make_examples.py --no-run            as they open, without running them

Each workflow is opened in the graph editor, saved as the editor saves it (so that new inputs are in it), run, and
photographed: example_workflows/<name>.json and .jpg (the first is the README's picture too), and each node as it looks
then for its help page (js/docs/<node>/node.jpg). What cannot be run here for want of its checkpoint is photographed as
it opens.
"""

from __future__ import annotations

import argparse
import io
import json
import shutil
import sys
import time
import uuid
from pathlib import Path
from typing import Any

sys.path.append(str(Path(__file__).resolve().parent.parent / "tests"))

from comfy_server import FP32_FLAGS, ComfyClient, ComfyServer
from js.browser import OUT_OF_THE_WAY, READY, Browser, Page
from setup_env import CACHE, ROOT, ensure_environment

EXAMPLES = ROOT / "example_workflows"
FIRST = "train_and_sample"
NOT_RUN = {"sd15_train_and_sample", "sdxl_train_and_sample"}
QUICK = {
    "GenerateClassPriors": {"count": 4, "steps": 4},
    "DreamBoothLoRATrain": {"steps": 8, "validation_interval": 2},
    "KSampler": {"steps": 4},
}
# Which example shows a node at work; a node that is in none is photographed as it is when new.
SHOWN_IN = {
    "LoadDemoBase": FIRST,
    "LoadSubjectImages": FIRST,
    "GenerateClassPriors": FIRST,
    "DreamBoothLoRATrain": FIRST,
    "DreamBoothOptions": FIRST,
    "ApplySubjectLoRA": "use_a_trained_lora",
}
MOST_BYTES, MOST_BYTES_OF_A_NODE = 150_000, 60_000
TIME_LIMIT = 3 * 3600.0


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("names", nargs="*", help="examples, without .json; all when none is named")
    parser.add_argument("--quick", action="store_true", help="few steps; JSON files and js/docs/ are left alone")
    parser.add_argument("--no-run", action="store_true", help="do not run them")
    parser.add_argument("--output", type=Path, default=EXAMPLES, help="where the pictures go")
    options = parser.parse_args()
    environment = ensure_environment()
    names = options.names or sorted((path.stem for path in EXAMPLES.glob("*.json")), key=lambda name: name != FIRST)
    server = ComfyServer(
        environment.comfyui,
        CACHE / "examples",
        packs={"SubjectBooth": ROOT},
        args=[*FP32_FLAGS, "--disable-api-nodes"],
        python=environment.python,
    )
    options.output.mkdir(parents=True, exist_ok=True)
    if FIRST in names:  # a LoRA that another training has left would keep its name
        shutil.rmtree(server.models_dir / "loras", ignore_errors=True)
    with server, ComfyClient(server.url, server) as client, Browser(width=2200, height=1300) as browser:
        for setting, value in OUT_OF_THE_WAY.items():
            client.request("POST", f"/settings/{setting}", value)
        page = browser.open(server.url)
        page.wait_for(READY, 300)
        for name in names:
            picture = _make(page, name, options.quick, options.no_run or name in NOT_RUN)
            (options.output / f"{name}.jpg").write_bytes(picture)
            print(f"{name}.jpg: {len(picture) / 1000:.0f} kB", flush=True)
            for kind in [kind for kind, shown in SHOWN_IN.items() if shown == name]:
                target = options.output / f"{kind}.jpg" if options.quick else ROOT / "js" / "docs" / kind / "node.jpg"
                target.write_bytes(photograph_node(page, kind))
    return 0


def _make(page: Page, name: str, quick: bool, no_run: bool) -> bytes:
    """Open one example, save it as the editor does, run it, and photograph it."""
    path = EXAMPLES / f"{name}.json"
    workflow = json.loads(path.read_text(encoding="utf-8"))
    page.evaluate(f"app.loadGraphData({json.dumps(workflow)}).then(() => 1)")
    time.sleep(2)
    if not quick:
        saved: dict[str, Any] = page.evaluate("JSON.parse(JSON.stringify(app.graph.serialize()))")
        text = json.dumps(as_shipped(name, saved), ensure_ascii=False, indent=1)
        path.write_text(text + "\n", encoding="utf-8")
    else:
        page.evaluate(
            f"for (const [type, values] of Object.entries({json.dumps(QUICK)}))"
            " for (const node of app.graph.nodes.filter(n => n.type === type))"
            "  for (const widget of node.widgets) if (widget.name in values) widget.value = values[widget.name]"
        )
    if not no_run:
        page.evaluate(
            "window.ended = null;"
            " for (const kind of ['execution_success', 'execution_error', 'execution_interrupted'])"
            "  app.api.addEventListener(kind, e => {"
            "   window.ended = {kind, said: e.detail?.exception_message ?? ''}; });"
            " app.queuePrompt(0, 1).then(() => 1)"
        )
        ended = page.wait_for("window.ended", TIME_LIMIT)
        if ended["kind"] != "execution_success":
            raise SystemExit(f"{name}: {ended['kind']} {ended['said']}")
    return photograph(page)


def as_shipped(name: str, workflow: dict[str, Any]) -> dict[str, Any]:
    """Without where the canvas was and which front end drew it, so that a file changes only with its workflow."""
    # A graph may have no id (all zeros); by their ids the training panel tells workflows apart.
    own = uuid.uuid5(uuid.NAMESPACE_URL, f"https://github.com/subjectbooth/SubjectBooth/example_workflows/{name}")
    for node in workflow["nodes"]:
        for left in ("class_images", "subjectbooth_run"):  # what a panel showed last
            node.get("properties", {}).pop(left, None)
    return {**workflow, "id": str(own), "extra": {"ds": {"scale": 1, "offset": [0, 0]}}}


def photograph(page: Page) -> bytes:
    """The whole graph as a JPEG of at most :data:`MOST_BYTES`."""
    page.evaluate("document.querySelectorAll('.p-toast-message').forEach(e => e.remove())")
    page.evaluate("app.canvas.deselectAll?.()")
    page.evaluate("app.extensionManager.command.execute('Comfy.Canvas.FitView')")
    time.sleep(6)  # the view glides, and pictures load once they are on the screen
    return _clip(page, "app.graph.nodes", 20, MOST_BYTES)


def photograph_node(page: Page, kind: str) -> bytes:
    """One node at its natural size; a new one of this kind when the graph has none that is open."""
    page.evaluate(
        f"(() => {{ window.shown ="
        f" app.graph.nodes.find(n => n.type === {json.dumps(kind)} && !n.flags.collapsed);"
        f" if (!window.shown) {{ window.shown = LiteGraph.createNode({json.dumps(kind)});"
        "  window.shown.pos = [-900, 100]; app.graph.add(window.shown); }"
        " const ds = app.canvas.ds; ds.scale = 1; ds.offset[0] = 300 - window.shown.pos[0];"
        " ds.offset[1] = 150 - window.shown.pos[1]; app.graph.setDirtyCanvas(true, true); })()"
    )
    time.sleep(4)
    return _clip(page, "[window.shown]", 8, MOST_BYTES_OF_A_NODE)


def _clip(page: Page, nodes: str, margin: int, most: int) -> bytes:
    """What the page shows of these nodes (a JavaScript list) and of `margin` pixels around them, as a JPEG."""
    from PIL import Image

    box = page.evaluate(
        f"(() => {{ const all = {nodes}.map(n => n.getBounding()), ds = app.canvas.ds, margin = {margin};"
        " const left = Math.min(...all.map(b => b[0])) - margin, top = Math.min(...all.map(b => b[1])) - margin - 15;"
        " const right = Math.max(...all.map(b => b[0] + b[2])) + margin;"
        " const bottom = Math.max(...all.map(b => b[1] + b[3])) + margin;"
        " const c = app.canvas.canvas.getBoundingClientRect(), at = (v, o) => (v + o) * ds.scale;"
        " return {x: c.x + at(left, ds.offset[0]), y: c.y + at(top, ds.offset[1]),"
        " width: (right - left) * ds.scale, height: (bottom - top) * ds.scale}; })()"
    )
    file = CACHE / "examples" / "picture.png"
    page.screenshot(file, clip=box)
    picture = Image.open(file).convert("RGB")
    for quality in (70, 60, 50, 40):  # all of them ship with the pack
        content = io.BytesIO()
        picture.save(content, "JPEG", quality=quality, optimize=True, progressive=True)
        if content.tell() <= most:
            break
    return content.getvalue()


if __name__ == "__main__":
    raise SystemExit(main())
