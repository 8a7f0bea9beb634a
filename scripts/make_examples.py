"""Regenerate the screenshots of the example workflows in a real ComfyUI and a real browser; needs chromium.

    python scripts/make_examples.py                     run all examples
    python scripts/make_examples.py train_only --quick  run one of them with a few steps, to test this script
    python scripts/make_examples.py --no-run            only open them

Each workflow is opened in the graph editor, saved by the editor (which adds new inputs) and run. Then screenshots are
taken: of the graph for example_workflows/<name>.jpg (the first one is also in the README), and of each node for its
help page (js/docs/<node>/node.jpg). Workflows whose checkpoint is not available here are not run.
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
NOT_RUN = {f"{name}_train_and_sample" for name in ("sd15", "sdxl", "z_image", "flux2_klein")}
QUICK = {
    "GenerateClassPriors": {"count": 4, "steps": 4},
    "DreamBoothLoRATrain": {"steps": 8, "validation_interval": 2},
    "KSampler": {"steps": 4},
}
# The example that each node's screenshot is taken from.
SHOWN_IN = {
    "LoadDemoBase": FIRST,
    "LoadSubjectImages": FIRST,
    "GenerateClassPriors": FIRST,
    "DreamBoothLoRATrain": FIRST,
    "DreamBoothOptions": FIRST,
    "ApplySubjectLoRA": "use_a_trained_lora",
}
MAX_BYTES, MAX_NODE_BYTES = 58_000, 50_000
MAX_WIDTH = 960
"""Pixels; the registry's package has little room left."""
TIME_LIMIT = 3 * 3600.0


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("names", nargs="*", help="names of examples, without .json; default: all")
    parser.add_argument("--quick", action="store_true", help="few steps; do not change JSON files and js/docs/")
    parser.add_argument("--no-run", action="store_true", help="do not run the workflows")
    parser.add_argument("--output", type=Path, default=EXAMPLES, help="folder for the screenshots")
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
    if FIRST in names:  # so that the new LoRA gets the default name
        shutil.rmtree(server.models_dir / "loras", ignore_errors=True)
    with server, ComfyClient(server.url, server) as client, Browser(width=2200, height=1900) as browser:
        for setting, value in {**OUT_OF_THE_WAY, "Comfy.Workflow.ShowMissingModelsWarning": False}.items():
            client.request("POST", f"/settings/{setting}", value)
        page = browser.open(server.url)
        page.wait_for(READY, 300)
        for name in names:
            picture = _screenshot_example(page, name, options.quick, options.no_run or name in NOT_RUN)
            (options.output / f"{name}.jpg").write_bytes(picture)
            print(f"{name}.jpg: {len(picture) / 1000:.0f} kB", flush=True)
            for kind in [kind for kind, shown in SHOWN_IN.items() if shown == name]:
                target = options.output / f"{kind}.jpg" if options.quick else ROOT / "js" / "docs" / kind / "node.jpg"
                target.write_bytes(screenshot_node(page, kind))
    return 0


def _screenshot_example(page: Page, name: str, quick: bool, no_run: bool) -> bytes:
    """Open one example in the editor, save it, run it, and take a screenshot."""
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
            " for (const node of (function all(g) { return g.nodes.flatMap(n => n.subgraph ? all(n.subgraph) : [n]); })"
            "(app.graph).filter(n => n.type === type))"
            "  for (const widget of node.widgets) if (widget.name in values) widget.value = values[widget.name]"
        )
    if not no_run:
        page.evaluate(
            "window.ended = null;"
            " for (const kind of ['execution_success', 'execution_error', 'execution_interrupted'])"
            "  app.api.addEventListener(kind, e => {"
            "   window.ended = {kind, message: e.detail?.exception_message ?? ''}; });"
            " app.queuePrompt(0, 1).then(() => 1)"
        )
        ended = page.wait_for("window.ended", TIME_LIMIT)
        if ended["kind"] != "execution_success":
            raise SystemExit(f"{name}: {ended['kind']} {ended['message']}")
    return screenshot_graph(page)


def as_shipped(name: str, workflow: dict[str, Any]) -> dict[str, Any]:
    """Remove the canvas position and the front end's version, so that a file only changes with its workflow."""
    # The training panel distinguishes workflows by their id, which the editor may leave empty (all zeros).
    fixed_id = uuid.uuid5(uuid.NAMESPACE_URL, f"https://github.com/subjectbooth/SubjectBooth/example_workflows/{name}")
    for node in workflow["nodes"]:
        for panel_state in ("class_images", "subjectbooth_run"):
            node.get("properties", {}).pop(panel_state, None)
    return {**workflow, "id": str(fixed_id), "extra": {"ds": {"scale": 1, "offset": [0, 0]}}}


def screenshot_graph(page: Page) -> bytes:
    """The whole graph as a JPEG of at most :data:`MAX_BYTES`."""
    page.evaluate("document.querySelectorAll('.p-toast-message').forEach(e => e.remove())")
    page.evaluate("app.canvas.deselectAll?.()")
    page.evaluate("app.extensionManager.command.execute('Comfy.Canvas.FitView')")
    time.sleep(6)  # the view is animated, and images load once they are visible
    return _clip(page, "app.graph.nodes", 20, MAX_BYTES)


def screenshot_node(page: Page, kind: str) -> bytes:
    """One node at its natural size; a new one if the graph has none of this type, or only collapsed ones."""
    page.evaluate(
        f"(() => {{ window.shown ="
        f" app.graph.nodes.find(n => n.type === {json.dumps(kind)} && !n.flags.collapsed);"
        f" if (!window.shown) {{ window.shown = LiteGraph.createNode({json.dumps(kind)});"
        "  window.shown.pos = [-900, 100]; app.graph.add(window.shown); }"
        " const ds = app.canvas.ds; ds.scale = 1; ds.offset[0] = 300 - window.shown.pos[0];"
        " ds.offset[1] = 150 - window.shown.pos[1]; app.graph.setDirtyCanvas(true, true); })()"
    )
    time.sleep(4)
    return _clip(page, "[window.shown]", 8, MAX_NODE_BYTES)


def _clip(page: Page, nodes: str, margin: int, max_bytes: int) -> bytes:
    """A JPEG of these nodes (a JavaScript list) with `margin` pixels around them."""
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
    picture.thumbnail((MAX_WIDTH, MAX_WIDTH), Image.Resampling.LANCZOS)
    for quality in (70, 60, 50, 40):  # the pack ships these files, so they should be small
        content = io.BytesIO()
        picture.save(content, "JPEG", quality=quality, optimize=True, progressive=True)
        if content.tell() <= max_bytes:
            break
    return content.getvalue()


if __name__ == "__main__":
    raise SystemExit(main())
