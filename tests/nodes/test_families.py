"""SD 2.x and SDXL in the real ComfyUI, on small random checkpoints in their true single-file layouts."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from subjectbooth.tests.comfy_server import ComfyClient, find_comfyui
from subjectbooth.tests.nodes.graphs import node
from subjectbooth.tests.nodes.test_shell import losses_of, run_here, write_photos
from subjectbooth.tests.nodes.training_graphs import SIZE, apply_node, subject_node, train_node, upload_cat

ROOT = Path(__file__).resolve().parents[2]


@pytest.mark.slow
@pytest.mark.parametrize(
    ("family", "text_layers", "attentions"),
    [
        # Layers of the file: 6 a text layer; 8 projections and 2 MLP layers a transformer block of the UNet.
        ("SD 2.x", {"lora_te_": 23 * 6}, 4),
        ("SDXL", {"lora_te1_": 11 * 6, "lora_te2_": 32 * 6}, 70),
    ],
)
def test_a_whole_graph_on_another_family(
    comfy: ComfyClient, tmp_path: Path, family: str, text_layers: dict[str, int], attentions: int
) -> None:
    if family == "SDXL" and not os.environ.get("SUBJECTBOOTH_SLOW"):
        pytest.skip("a second text encoder of 695 M parameters, three times over, takes 12 GB: set SUBJECTBOOTH_SLOW=1")
    comfyui = find_comfyui(ROOT)
    assert comfyui is not None
    name = f"small_{family.replace(' ', '')}.safetensors"
    checkpoint = comfy.server.models_dir / "checkpoints" / name
    done = subprocess.run(
        [sys.executable, str(ROOT / "tests" / "nodes" / "write_layout.py"), str(comfyui), family, str(checkpoint)],
        capture_output=True,
        text=True,
        timeout=300,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    options = comfy.defaults("DreamBoothOptions")
    graph = {
        "1": node("CheckpointLoaderSimple", ckpt_name=name),
        "10": subject_node(upload_cat(comfy)),
        "9": node(
            "DreamBoothOptions",
            **{**options, "train_text_encoder": True, "text_encoder_lr": 0.01, "lora_targets": "attention+mlp"},
        ),
        "11": train_node(steps=2, learning_rate=0.01, seed=31, output_name=f"on_{family}", options=["9", 0]),
        "12": apply_node(),
        "20": node(
            "ProbePredictions",
            model=["1", 0],
            clip=["1", 1],
            vae=["1", 2],
            image=["10", 1],
            prompt="a photo of ohwx cat",
            nonce=1,
        ),
        "21": node(
            "ProbePredictions",
            model=["1", 0],
            clip=["1", 1],
            vae=["1", 2],
            image=["10", 1],
            prompt="a photo of ohwx cat",
            nonce=2,
            applied=["12", 0],
            subject_lora=["11", 0],
        ),
        "22": node("ProbeText", model=["1", 0], clip=["1", 1], prompt="a (photo:1.2) of ohwx cat", nonce=3),
        "23": node(
            "ProbeText",
            model=["1", 0],
            clip=["1", 1],
            prompt="a photo of ohwx cat",
            nonce=4,
            applied=["12", 1],
            subject_lora=["11", 0],
        ),
        "24": node("ProbeBothPaths", model=["1", 0], clip=["1", 1], vae=["1", 2], nonce=5),
        "30": node("CLIPTextEncode", clip=["12", 1], text=["12", 2]),
        "31": node("EmptyLatentImage", width=64, height=64, batch_size=1),
        "32": node(
            "KSampler",
            model=["12", 0],
            positive=["30", 0],
            negative=["30", 0],
            latent_image=["31", 0],
            seed=1,
            steps=2,
            cfg=1.0,
            sampler_name="euler",
            scheduler="normal",
            denoise=1.0,
        ),
        "33": node("VAEDecode", samples=["32", 0], vae=["1", 2]),
        "34": node("ProbeImage", value=["33", 0]),
    }
    try:
        result = comfy.run(graph, timeout=900)
        comfy.free()
        shell = run_here(
            "--base",
            str(checkpoint),
            "--photos",
            str(write_photos(tmp_path / "photos")),
            "--class-word",
            "cat",
            "--output_dir",
            str(tmp_path / "out"),
            "--resolution",
            str(SIZE),
            "--steps",
            "2",
            "--rank",
            "4",
            "--network_alpha",
            "2",
            "--learning_rate",
            "0.01",
            "--train_text_encoder",
            "--text_encoder_lr",
            "0.01",
            "--lora_targets",
            "attention+mlp",
            "--seed",
            "31",
            "--cpu",
            "--preservation",
            "none",
        )
    finally:
        checkpoint.unlink()
    assert shell.returncode == 0, shell.stderr
    # The text encoder's names, layer and padding are the family's own from a file too.
    in_shell, in_graph = (
        losses_of(tmp_path / "out" / "runs", 31, 2),
        losses_of(comfy.server.output_dir / "subjectbooth", 31, 2),
    )
    print(f"losses from the shell {in_shell}, in ComfyUI {in_graph}")
    assert in_shell == pytest.approx(in_graph, rel=1e-3)
    reports = {number: result.outputs[number]["report"][0] for number in ("20", "21", "22", "23", "24", "34")}
    print(json.dumps({family: reports}))
    for number in ("20", "21", "22", "23"):
        assert reports[number]["difference"] < 1e-4 * max(1.0, reports[number]["scale"]), number
    assert reports["21"]["effect"] > 1e-3
    both = reports["24"]  # of the step on the connected model, and through diffusers
    assert both["wired_loss"] == pytest.approx(both["loss"], rel=1e-4) and both["difference"] < 1e-3, both
    assert reports["23"]["effect"] > 1e-3
    assert reports["34"]["finite"]
    content = (comfy.server.models_dir / "loras" / f"on_{family}.safetensors").read_bytes()
    header = json.loads(content[8 : 8 + int.from_bytes(content[:8], "little")])
    layers = {key.split(".")[0] for key in header if key != "__metadata__"}
    assert f"matched {len(layers)}/{len(layers)}" in result.outputs["11"]["text"][0]
    for prefix, count in text_layers.items():
        assert sum(layer.startswith(prefix) for layer in layers) == count
    assert sum(layer.startswith("lora_unet_") for layer in layers) == attentions * 10
