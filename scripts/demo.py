"""Train and sample in a real ComfyUI from scratch: set it up, start it, run the example workflow, save the results.

    python scripts/demo.py [workflow.json]     results go to demo_output/
    python scripts/demo.py --ui                leave ComfyUI running for a browser, with the newest tested front end

Set COMFYUI_PATH to use an existing ComfyUI; its models and outputs stay untouched, because it runs with the folders in
.cache/demo. Set SUBJECTBOOTH_PYTHON to use an existing Python instead of .venv.
"""

from __future__ import annotations

import argparse
import io
import json
import os
import re
import shutil
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

sys.path.append(str(Path(__file__).resolve().parent.parent / "tests"))

from comfy_server import (
    ENDS,
    FP32_FLAGS,
    ComfyClient,
    ComfyError,
    ComfyServer,
    Event,
    exit_on_sigterm,
    free_port,
)
from setup_env import CACHE, ROOT, ensure_environment, front_end_flags
from workflow import to_api

WORKFLOW = ROOT / "example_workflows" / "train_and_sample.json"
OUTPUT = ROOT / "demo_output"
PACK = "SubjectBooth"
DEFAULT_PORT = 8188
TIME_LIMIT = 3 * 3600.0


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("workflow", nargs="?", type=Path, default=WORKFLOW, help="a workflow saved by the graph editor")
    parser.add_argument("--ui", action="store_true", help="leave the server running for a browser")
    parser.add_argument("--output", type=Path, default=OUTPUT, help="folder for the results")
    parser.add_argument("--base-directory", type=Path, default=CACHE / "demo", help="ComfyUI's models, input, output")
    options = parser.parse_args()

    environment = ensure_environment()
    if Path(sys.executable).absolute() != environment.python:
        # The ComfyUI client needs the packages of that environment.
        env = {
            **os.environ,
            "COMFYUI_PATH": str(environment.comfyui),
            "SUBJECTBOOTH_PYTHON": str(environment.python),
        }
        command = [str(environment.python), *sys.argv]
        if os.name != "nt":
            os.execve(command[0], command, env)  # keeps the process, so that signals need no forwarding
        return subprocess.run(command, env=env).returncode

    exit_on_sigterm()
    device, flags = _device()
    print(f"Starting ComfyUI ({environment.comfyui}) on the {device} ...", flush=True)
    server = ComfyServer(
        environment.comfyui,
        options.base_directory,
        packs={PACK: ROOT},
        args=[*flags, "--disable-api-nodes", *(front_end_flags(environment) if options.ui else ())],
        cpu=device == "CPU",
        port=_default_port() if options.ui else None,
    )
    try:
        with server:
            if options.ui:
                _leave_running(server)
            else:
                _run_workflow(server, options.workflow, options.output)
    except KeyboardInterrupt:
        print("\nStopped.")
        return 130
    except ComfyError as error:
        print(f"\n{error}", file=sys.stderr)
        return 1
    return 0


def _device() -> tuple[str, tuple[str, ...]]:
    import torch

    if torch.cuda.is_available():
        return "GPU", ()
    if torch.backends.mps.is_available():
        return "GPU (Metal)", ()
    return "CPU", FP32_FLAGS


def _default_port() -> int:
    import socket

    with socket.socket(socket.AF_INET, socket.SOCK_STREAM) as sock:
        try:
            sock.bind(("127.0.0.1", DEFAULT_PORT))
        except OSError:
            return free_port()
    return DEFAULT_PORT


def _leave_running(server: ComfyServer) -> None:
    print(f"\nComfyUI is running at {server.url}")
    print(f"With the example: {server.url}/?template={WORKFLOW.stem}&source={PACK}")
    print("Press Ctrl-C to stop it.", flush=True)
    while server.alive():
        time.sleep(1)
    raise ComfyError(f"ComfyUI has exited.\n{server.log_tail()}")


def _run_workflow(server: ComfyServer, path: Path, output: Path) -> None:
    workflow = json.loads(path.read_text(encoding="utf-8"))
    started = time.monotonic()
    with ComfyClient(server.url, server) as client:
        prompt = to_api(workflow, client.object_info())
        print(f"Queueing {path.name}: {len(prompt)} nodes", flush=True)
        prompt_id = client.queue(prompt, extra_data={"extra_pnginfo": {"workflow": workflow}})
        _Reporter(client, prompt).follow(prompt_id)
        entry = client.wait(prompt_id)
        saved = _save_results(client, entry, prompt, server, output)
        saved += _save_grid(client, entry, prompt, output)
    seconds = time.monotonic() - started
    print(f"\nDone in {seconds:.0f} s. In {output}:")
    for file in saved:
        print(f"  {file.relative_to(output)}  ({file.stat().st_size / 2**20:.1f} MB)")


class _Reporter:
    """Prints the progress, at most one line per second."""

    def __init__(self, client: ComfyClient, prompt: dict[str, dict[str, Any]]) -> None:
        self.client = client
        self.titles = {node_id: node["_meta"]["title"] for node_id, node in prompt.items()}
        self.texts: dict[str, str] = {}
        self.node: str | None = None
        self.node_started = 0.0
        self.printed_at = 0.0
        self.printed = ""

    def follow(self, prompt_id: str) -> None:
        """Print the progress until the prompt has ended, successfully or not."""
        seen = 0
        started = time.monotonic()
        while True:
            event = self.client.wait_event(lambda _: True, timeout=2, missing_ok=True, since=seen)
            if event is None:
                if self.client.history(prompt_id) is not None:
                    return
                if time.monotonic() - started > TIME_LIMIT:
                    raise ComfyError(f"The workflow was still running after {TIME_LIMIT / 3600:.0f} hours.")
                continue
            seen += 1
            if event.type in ENDS and event.prompt_id == prompt_id:
                return
            self._show(event)

    def _show(self, event: Event) -> None:
        data = event.data
        if event.type == "execution_cached" and data.get("nodes"):
            names = ", ".join(self.titles.get(str(n), str(n)) for n in data["nodes"])
            self._print(f"cached: {names}")
        elif event.type == "executing" and data.get("node") in self.titles:
            self.node, self.node_started = data["node"], event.time
            self._print(f"{self.titles[data['node']]} ...")
        elif event.type == "progress_text":
            self.texts[data["node"]] = data["text"]
            self._print(f"  {data['text']}", throttle=True)
        elif event.type == "progress" and data.get("node") not in self.texts:
            done, total = data["value"], data["max"]
            left = (event.time - self.node_started) / done * (total - done) if done else 0.0
            self._print(f"  {done}/{total}  ETA {left:.0f} s", throttle=done < total)

    def _print(self, line: str, throttle: bool = False) -> None:
        now = time.monotonic()
        if line == self.printed or (throttle and now - self.printed_at < 1.0):
            return
        self.printed_at, self.printed = now, line
        print(line, flush=True)


def _save_results(
    client: ComfyClient,
    entry: dict[str, Any],
    prompt: dict[str, dict[str, Any]],
    server: ComfyServer,
    output: Path,
) -> list[Path]:
    """Copy all images that nodes showed, except the user's photos, and the LoRA."""
    output.mkdir(parents=True, exist_ok=True)
    saved = []
    for node_id, shown in entry["outputs"].items():
        title = _plain(prompt[node_id]["_meta"]["title"])
        generated = [record for record in shown.get("images", []) if record["type"] != "input"]
        for number, record in enumerate(generated, 1):
            target = output / f"{title}_{number:03}{Path(record['filename']).suffix}"
            target.write_bytes(client.view(record["filename"], record["subfolder"], record["type"]))
            saved.append(target)
        for name in re.findall(r"[^\s/\\]+\.safetensors", " ".join(map(str, shown.get("text", [])))):
            for lora in (server.models_dir / "loras").rglob(name):
                shutil.copyfile(lora, output / name)
                saved.append(output / name)
    if not saved:
        raise ComfyError(f"The workflow ran, but no node showed an image or a LoRA.\n{server.log_tail()}")
    return saved


def _save_grid(
    client: ComfyClient, entry: dict[str, Any], prompt: dict[str, dict[str, Any]], output: Path
) -> list[Path]:
    """Save one image of the photos, the class before, the subject in new scenes, and the class after training."""
    # Pillow is installed in the environment of ensure_environment(), not in the Python that started the script.
    from demo_grid import draw_grid, grid_rows
    from PIL import Image

    grid = grid_rows(prompt)
    if grid is None:
        return []
    print("Drawing the grid ...", flush=True)
    loader = next(name for name, node in prompt.items() if node["class_type"] == "LoadSubjectImages")
    shown = entry["outputs"].get(loader, {}).get("images", [])
    photos: list[Image.Image] = [Image.open(io.BytesIO(client.view(**record))) for record in shown]
    target = output / "grid.png"
    draw_grid(client, *grid, photos).save(target)
    return [target]


def _plain(title: str) -> str:
    return re.sub(r"[^a-z0-9]+", "_", title.lower()).strip("_")


if __name__ == "__main__":
    raise SystemExit(main())
