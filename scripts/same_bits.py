"""Check that a change is bit-exact: train with two checkouts and compare the LoRA tensors and the losses.

    python scripts/same_bits.py BEFORE [AFTER] [--only plain classes ...]

BEFORE and AFTER are checkouts of this repository (default for AFTER: this one). Only public interfaces are used (the
CLI and, through ComfyUI's API, the nodes), so that the code may differ in any way. Exit code 1 if anything differs.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

sys.path.append(str(Path(__file__).resolve().parent.parent / "tests"))

from comfy_server import FP32_FLAGS, ComfyClient, ComfyServer, copy_file, exit_on_sigterm
from setup_env import CACHE, ROOT, ensure_environment

PHOTOS = ROOT / "demo" / "subjects" / "dog" / "train"
COMMON = [
    "--class_word", "dog", "--resolution", "64", "--rank", "4", "--learning_rate", "1e-3", "--steps", "6",
    "--validation_prompts", "a photo of {subject}", "--validation_interval", "3", "--validation_steps", "2", "--cpu",
]  # fmt: skip
SHELL: dict[str, tuple[str, list[str]]] = {
    "plain": ("sd1", []),
    "classes": ("sd1", ["--num_class_images", "2", "--prior_loss_weight", "0.7"]),
    "text": ("sd1", ["--train_text_encoder", "--gradient_accumulation_steps", "2", "--enable_bucket"]),
    "text, average": ("sd1", ["--train_text_encoder", "--ema_decay", "0.9", "--train_batch_size", "2"]),
    "v": (
        "sd1",
        ["--prediction_type", "v_prediction", "--snr_gamma", "5", "--flip", "--noise_offset", "0.05"],
    ),
    "sdxl": ("sdxl", ["--num_class_images", "1", "--lora_targets", "all", "--steps", "2"]),
}
GRAPH: dict[str, dict[str, Any]] = {
    "ComfyUI": {},
    "ComfyUI, classes": {"priors": True},
    "ComfyUI, text": {"options": {"train_text_encoder": True, "lora_targets": "attention+mlp"}},
}


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("before", type=Path, help="a checkout")
    parser.add_argument("after", type=Path, nargs="?", default=ROOT, help="another checkout (default: this one)")
    parser.add_argument("--only", nargs="*", choices=[*SHELL, *GRAPH], default=[*SHELL, *GRAPH])
    options = parser.parse_args()
    environment = ensure_environment()
    if Path(sys.executable).absolute() != environment.python:
        return subprocess.run([str(environment.python), *sys.argv], check=False).returncode
    exit_on_sigterm()
    checkouts = [path.expanduser().resolve() for path in (options.before, options.after)]
    different = 0
    print(f"{'run':<20}{'tensors':>8}{'differ':>8}{'losses':>8}{'differ':>8}  same key", flush=True)
    with tempfile.TemporaryDirectory(prefix="same_bits_") as scratch:
        for name in options.only:
            results = []
            for number, checkout in enumerate(checkouts):
                folder = Path(scratch) / f"{name}_{number}".replace(", ", "_")
                folder.mkdir()
                train: Callable[..., Path] = in_comfyui if name in GRAPH else from_shell
                results.append(read_run(train(environment, checkout, name, folder)))
            different += compare(name, *results)
    return int(bool(different))


def from_shell(environment: Any, checkout: Path, name: str, folder: Path) -> Path:
    """Train with `python -m trainer`; returns the run's folder."""
    family, extra = SHELL[name]
    command = [str(environment.python), "-m", "trainer", "--base", str(checkpoint(environment, family))]
    command += ["--photos", str(PHOTOS), "--output_dir", str(folder), *COMMON, *extra]
    env = {**os.environ, "OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1"}
    done = subprocess.run(command, cwd=checkout, env=env, capture_output=True, text=True, check=False)
    if done.returncode:
        raise SystemExit(f"{checkout}, {name}:\n{done.stdout[-2000:]}\n{done.stderr[-2000:]}")
    return only_run(folder / "runs")


def in_comfyui(environment: Any, checkout: Path, name: str, folder: Path) -> Path:
    """Train with the checkout's nodes in a separate ComfyUI; returns the run's folder."""
    settings = GRAPH[name]
    copy_file(checkpoint(environment, "sd1"), folder / "models" / "checkpoints" / "base.safetensors")
    server = ComfyServer(
        environment.comfyui,
        folder,
        packs={"SubjectBooth": checkout},
        args=[*FP32_FLAGS, "--disable-api-nodes"],
        env={"OMP_NUM_THREADS": "1"},
    )
    with server, ComfyClient(server.url, server) as client:

        def node(kind: str, **inputs: Any) -> dict[str, Any]:
            return {"class_type": kind, "inputs": {**client.defaults(kind), **inputs}}

        links = {"model": ["1", 0], "clip": ["1", 1], "vae": ["1", 2], "subject": ["2", 0]}
        graph = {
            "1": node("CheckpointLoaderSimple", ckpt_name="base.safetensors"),
            "2": node(
                "LoadSubjectImages",
                images={"__value__": client.upload_images(sorted(PHOTOS.glob("*")))},
                sample="none",
                class_word="dog",
                resolution=64,
            ),
            "3": node("DreamBoothLoRATrain", **links, steps=6, rank=4, learning_rate=1e-3, validation_interval=3),
            "4": node(
                "ApplySubjectLoRA",
                model=["1", 0],
                clip=["1", 1],
                lora_name="(from subject_lora)",
                subject_lora=["3", 0],
            ),
        }
        if settings.get("priors"):
            graph["5"] = node("GenerateClassPriors", **links, num_class_images=2, steps=2)
            graph["3"]["inputs"]["class_priors"] = ["5", 0]
        if settings.get("options"):
            graph["6"] = node("DreamBoothOptions", **settings["options"])
            graph["3"]["inputs"]["options"] = ["6", 0]
        client.run(graph, timeout=1200)
    return only_run(server.output_dir / "subjectbooth")


def checkpoint(environment: Any, family: str) -> Path:
    """A small random base of the family, created once."""
    path = CACHE / "same_bits" / f"{family}.safetensors"
    if not path.is_file():
        path.parent.mkdir(parents=True, exist_ok=True)
        part = path.with_suffix(".part")
        if family == "sdxl":
            command = [
                str(ROOT / "tests" / "nodes" / "write_layout.py"),
                str(environment.comfyui),
                "SDXL",
                str(part),
            ]
            subprocess.run([str(environment.python), *command], cwd=environment.comfyui, check=True)
        else:
            import tiny

            copy_file(tiny.tiny_checkpoint(CACHE / "tiny"), part)
        part.rename(path)
    return path


def only_run(folder: Path) -> Path:
    (log,) = folder.glob("*/events.jsonl")
    return log.parent


def read_run(run: Path) -> dict[str, Any]:
    """The tensors of all LoRA files, the losses of all steps, and the run's key."""
    from safetensors.torch import load_file

    tensors = {
        f"{path.stem} {name}": tensor
        for path in sorted(run.glob("lora_*.safetensors"))
        for name, tensor in load_file(path).items()
    }
    events = [json.loads(line) for line in (run / "events.jsonl").read_text("utf-8").splitlines()]
    losses = [event["loss"] for event in events if event["event"] == "StepDone"]
    return {
        "tensors": tensors,
        "losses": losses,
        "key": json.loads((run / "run.json").read_text("utf-8"))["key"],
    }


def compare(name: str, before: dict[str, Any], after: dict[str, Any]) -> int:
    """Print one line; returns the number of differences."""
    import torch

    old, new = before["tensors"], after["tensors"]
    differ = [
        key
        for key in old.keys() | new.keys()
        if key not in old or key not in new or not torch.equal(old[key], new[key])
    ]
    losses = list(zip(before["losses"], after["losses"], strict=False))
    other = sum(a != b for a, b in losses) + abs(len(before["losses"]) - len(after["losses"]))
    same_key = before["key"] == after["key"]
    print(
        f"{name:<20}{len(old):>8}{len(differ):>8}{len(losses):>8}{other:>8}  {'yes' if same_key else 'NO'}",
        flush=True,
    )
    for key in sorted(differ)[:5]:
        print(f"    {key}" + ("" if key in old and key in new else " (in one only)"))
    return len(differ) + other


if __name__ == "__main__":
    raise SystemExit(main())
