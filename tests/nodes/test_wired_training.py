"""Training on the connected model itself, of every family, small, in the real ComfyUI."""

from __future__ import annotations

import json
from typing import Any

import pytest
import safetensors.torch
import torch

from subjectbooth.tests.comfy_server import ComfyClient, RunResult
from subjectbooth.tests.nodes.graphs import Graph, node
from subjectbooth.tests.nodes.training_graphs import apply_node, subject_node, train_node, upload_cat

KINDS = ("SD 3.5", "Flux.1", "Flux.2", "Z-Image", "Qwen-Image", "Chroma")
STEPS = 12


def wired_graph(comfy: ComfyClient, kind: str, *, stored: str = "float32", seed: int = 3, **train: Any) -> Graph:
    """ "1" base, "10" subject, "11" trainer, "12" apply, "90" the comparison of both predictions."""
    settings = {"steps": STEPS, "output_name": f"wired {kind}", "seed": 5, "resolution": 128, **train}
    wired = {"model": ["1", 0], "clip": ["1", 1], "vae": ["1", 2]}
    return {
        "1": node("ProbeWiredBase", kind=kind, seed=seed, stored=stored),
        "10": subject_node(upload_cat(comfy)),
        "11": train_node(**settings),
        "12": apply_node(),
        "90": node("ProbeWired", **wired, applied=["12", 0], subject_lora=["11", 0], nonce=0),
    }


def losses_of(comfy: ComfyClient, result: RunResult) -> list[float]:
    run = result.outputs["11"]["subjectbooth"][0]["run"]
    log = comfy.server.output_dir / "subjectbooth" / run / "events.jsonl"
    lines = [json.loads(line) for line in log.read_text("utf-8").splitlines()]
    return [line["loss"] for line in lines if line["event"] == "StepDone"]


def lora_of(comfy: ComfyClient, result: RunResult) -> dict[str, torch.Tensor]:
    name = result.outputs["11"]["subjectbooth"][0]["lora"]
    return safetensors.torch.load_file(comfy.server.models_dir / "loras" / name)


@pytest.mark.parametrize("kind", KINDS)
def test_trains_and_the_file_does_in_comfyui_what_the_trainer_saw(comfy: ComfyClient, kind: str) -> None:
    result = comfy.run(wired_graph(comfy, kind))
    shown = result.outputs["11"]["subjectbooth"][0]
    lora = lora_of(comfy, result)
    layers = {name.removesuffix(".lora_B.weight") for name in lora if name.endswith(".lora_B.weight")}
    assert shown["matched"] == shown["layers"] == len(layers) > 0
    (report,) = result.outputs["90"]["report"]
    assert report["difference"] < 1e-5 * max(1, report["scale"]) and report["effect"] > 100 * report["difference"]
