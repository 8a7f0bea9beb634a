"""Real GGUF files through the real ComfyUI-GGUF, where both can be had: that pack is no dependency of the tests.

COMFYUI_GGUF_PATH is its folder (github.com/city96/ComfyUI-GGUF), and PYTHONPATH has the package gguf, or it is
installed. Everywhere else, layers that stand in for the pack's are trained, see test_wired_training.py.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from subjectbooth.tests.comfy_server import ComfyClient, ComfyServer
from subjectbooth.tests.conftest import PACKS
from subjectbooth.tests.nodes.graphs import node
from subjectbooth.tests.nodes.training_graphs import apply_node, subject_node, train_node, upload_cat

PACK = os.environ.get("COMFYUI_GGUF_PATH", "")
pytestmark = pytest.mark.skipif(not PACK, reason="set COMFYUI_GGUF_PATH to the folder of ComfyUI-GGUF")


@pytest.fixture(scope="module")
def client(comfy_factory: Callable[..., ComfyServer]) -> Iterator[ComfyClient]:
    path = {"PYTHONPATH": os.environ.get("PYTHONPATH")}
    server = comfy_factory(packs={**PACKS, "ComfyUI-GGUF": Path(PACK)}, env=path)
    with server, ComfyClient(server.url, server) as client:
        yield client


@pytest.fixture
def base(client: ComfyClient, kind: str, quantised: str) -> dict[str, Any]:
    """ "1" is CLIP and VAE, "2" the model from its file, "3" the same numbers in plain weights."""
    if kind == "Flux.1" and "ProbeWiredBase" in (known := client.object_info()):
        if "Krea 2" not in known["ProbeWiredBase"]["input"]["required"]["kind"][0]:
            pytest.skip("ComfyUI 0.3.75 takes every file of Flux.1 for one of 3072 channels")
    file = {"kind": kind, "quantised": quantised, "seed": 3}
    (written,) = client.run({"1": node("ProbeWriteGguf", **file)}).outputs["1"]["report"]
    assert written["packed"] > 10
    return {
        "1": node("ProbeWiredBase", kind=kind, seed=3, stored="float32"),
        "2": node("UnetLoaderGGUF", unet_name=written["file"]),
        "3": node("ProbeGgufPlain", **file),
    }


EACH = pytest.mark.parametrize(
    ("kind", "quantised"), [("SD 3.5", "Q8_0"), ("SD 3.5", "Q4_0"), ("Flux.1", "Q8_0"), ("Flux.1", "Q4_0")]
)


@EACH
def test_gradients_are_those_of_the_dequantised_copy(client: ComfyClient, base: dict[str, Any]) -> None:
    wired = {"model": ["2", 0], "clip": ["1", 1], "vae": ["1", 2], "plain": ["3", 0]}
    graph = {**base, "91": node("ProbeWiredGradients", **wired, checkpointing=True, nonce=0)}
    (report,) = client.run(graph).outputs["91"]["report"]
    assert report["loss"] == pytest.approx(report["plain_loss"], rel=1e-5)
    assert report["difference"] < 1e-5 and report["with_gradient"] > 10 and report["left"] == [], report


@EACH
def test_a_whole_graph(client: ComfyClient, base: dict[str, Any], kind: str, quantised: str) -> None:
    """Trains, is found again after another load, and the file does in ComfyUI what the trainer saw."""
    wired = {"model": ["2", 0], "clip": ["1", 1], "vae": ["1", 2]}
    prediction = {**wired, "subject_lora": ["11", 0], "kind": kind, "seed": 3}
    name = f"gguf {kind} {quantised}"
    graph = {
        **base,
        "10": subject_node(upload_cat(client)),
        "11": train_node(
            model=("2", 0), steps=3, output_name=name, resolution=128, seed=5, learning_rate=0.01,
            preservation="curvature", validation_prompts="a photo of {subject}", validation_interval=2,
        ),
        "12": apply_node(model=("2", 0)),
        "90": node("ProbeWired", **prediction, applied=["12", 0]),
    }  # fmt: skip
    result = client.run(graph)
    shown = result.outputs["11"]["subjectbooth"][0]
    assert shown["matched"] == shown["layers"] > 0 and len(result.outputs["11"]["images"]) == 2
    own = {**graph, "13": node("LoraLoaderModelOnly", model=["2", 0], lora_name=shown["lora"], strength_model=1.0)}
    own["90"] = node("ProbeWired", **prediction, applied=["13", 0])
    for found in (result, client.run(own)):
        (report,) = found.outputs["90"]["report"]
        assert report["difference"] < 1e-5 * max(1, report["scale"]) and report["effect"] > 100 * report["difference"]
    bytes_of = {"model": ["2", 0], "kind": kind, "quantised": quantised}
    (after,) = client.run({**base, "92": node("ProbeGgufBytes", **bytes_of, nonce=0)}).outputs["92"]["report"]
    assert after["changed"] == [] and after["packed"] > 10
    client.free()
    again = client.run(graph, targets=("11",)).outputs["11"]
    assert again["text"][0].startswith("reused") and again["subjectbooth"][0]["run"] == shown["run"]
