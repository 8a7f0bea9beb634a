"""What is wired and cannot be trained on is refused in the real ComfyUI, before a class image is made for it."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import safetensors.torch
import torch

from subjectbooth.tests import tiny
from subjectbooth.tests.comfy_server import ComfyClient, NodeFailed
from subjectbooth.tests.nodes.graphs import Graph, node
from subjectbooth.tests.nodes.training_graphs import subject_node, train_node, upload_cat


def _save(path: Path, tensors: dict[str, torch.Tensor]) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    safetensors.torch.save_file({name: tensor.contiguous() for name, tensor in tensors.items()}, path)


@pytest.fixture(scope="module")
def images(_comfy_client: ComfyClient) -> list[str]:
    """Writes the models; the photos' names."""
    models = _comfy_client.server.models_dir
    unet = {name: tensor.half() for name, tensor in tiny.unet(3).items()}
    first = "model.diffusion_model.input_blocks.0.0.weight"
    for name, channels in (("plain", 4), ("inpainting", 9), ("edit", 8)):
        wider = torch.zeros(320, channels, 3, 3, dtype=torch.float16)
        wider[:, :4] = unet[first][:, :4]
        _save(models / "diffusion_models" / f"{name}.safetensors", {**unet, first: wider})
    _save(
        models / "diffusion_models" / "sd3.safetensors",
        {
            "joint_blocks.0.context_block.attn.qkv.weight": torch.zeros(192, 64),
            "joint_blocks.0.x_block.attn.qkv.weight": torch.zeros(192, 64),
            "x_embedder.proj.weight": torch.zeros(64, 16, 2, 2),
            "final_layer.linear.weight": torch.zeros(64, 64),
            "y_embedder.mlp.0.weight": torch.zeros(64, 2048),
            "context_embedder.weight": torch.zeros(64, 4096),
            "pos_embed": torch.zeros(1, 16, 64),
        },
    )
    # ComfyUI tells a text encoder by one weight; the rest stays unread.
    _save(
        models / "text_encoders" / "clip_h.safetensors",
        {"text_model.encoder.layers.22.mlp.fc1.weight": torch.zeros(4096, 1024, dtype=torch.float16)},
    )
    vae = {name.removeprefix("first_stage_model."): tensor for name, tensor in tiny.autoencoder(5).items()}
    vae["taesd_decoder.1.weight"] = torch.zeros(64, 16, 3, 3)
    last = max((name for name in vae if name.startswith("taesd_encoder.") and vae[name].shape[0] == 4), key=len)
    number = last.split(".")[1]
    vae |= {
        f"taesd_encoder.{number}.weight": torch.zeros(16, 64, 3, 3),
        f"taesd_encoder.{number}.bias": torch.zeros(16),
    }
    _save(models / "vae" / "sixteen.safetensors", vae)
    _save(models / "checkpoints" / "no_clip.safetensors", {**unet, **tiny.autoencoder(5)})
    return upload_cat(_comfy_client)


def _unet(name: str, dtype: str = "default") -> dict[str, Any]:
    return node("UNETLoader", unet_name=f"{name}.safetensors", weight_dtype=dtype)


CASES: dict[str, tuple[dict[str, Any], str, list[Any], str]] = {
    # What is wired instead of the checkpoint's own, to which input, and the sentence.
    "inpainting": (_unet("inpainting"), "model", ["8", 0], "9 input channels: it is an inpainting model"),
    "edit": (_unet("edit"), "model", ["8", 0], "8 input channels: it is an edit model"),
    "SD 3": (_unet("sd3"), "model", ["8", 0], "The VAE has 4 latent channels, and SD 3.5 has 16."),
    "EDM": (
        node("ModelSamplingContinuousEDM", model=["1", 0], sampling="v_prediction", sigma_max=120.0, sigma_min=0.002),
        "model",
        ["8", 0],
        "The model samples with",
    ),
    "flow": (node("ModelSamplingSD3", model=["1", 0], shift=3.0), "model", ["8", 0], "The model samples with"),
    "CLIP of SD 2.x": (
        node("CLIPLoader", clip_name="clip_h.safetensors", type="stable_diffusion", device="default"),
        "clip",
        ["8", 0],
        "The CLIP has clip_h, but the model is SD 1.x. Required: a CLIP with clip_l",
    ),
    "VAE of Flux": (
        node("VAELoader", vae_name="sixteen.safetensors"),
        "vae",
        ["8", 0],
        "The VAE has 16 latent channels",
    ),
    "no CLIP": (
        node("CheckpointLoaderSimple", ckpt_name="no_clip.safetensors"),
        "clip",
        ["8", 1],
        "The checkpoint has no CLIP",
    ),
}


@pytest.mark.parametrize("case", list(CASES))
def test_a_wired_base_is_refused_before_anything_is_made(comfy: ComfyClient, images: list[str], case: str) -> None:
    loader, name, link, sentence = CASES[case]
    wired = {"model": ["1", 0], "clip": ["1", 1], "vae": ["1", 2], name: link}
    graph: Graph = {
        "1": node("CheckpointLoaderSimple", ckpt_name="tiny15.safetensors"),
        "8": loader,
        "10": subject_node(images),
    }
    priors = node(
        "GenerateClassPriors",
        **wired,
        subject=["10", 0],
        class_prompt="a photo of a {class}",
        negative="",
        count=1,
        steps=1,
        cfg=1.0,
        sampler_name="euler",
        scheduler="normal",
        seed=987,
        batch_size=1,
        exclude="",
    )
    made = comfy.server.output_dir / "subjectbooth"
    before = set(made.rglob("*")) if made.is_dir() else set()
    for tried in ({"11": train_node(**wired, seed=987)}, {"20": priors}):
        with pytest.raises(NodeFailed) as failure:
            comfy.run({**graph, **tried})
        assert failure.value.node_id in tried
        assert sentence in failure.value.node_message
    assert (set(made.rglob("*")) if made.is_dir() else set()) == before


def test_a_base_quantised_by_comfyui_gguf_is_refused(comfy: ComfyClient) -> None:
    """The pack ComfyUI-GGUF itself is not here: one layer of the tiny model gives what its layers give (commit
    03842fa), stand-ins of packed bytes."""
    graph = {
        "1": node("CheckpointLoaderSimple", ckpt_name="tiny15.safetensors"),
        "99": node("ProbeQuantised", model=["1", 0], clip=["1", 1], vae=["1", 2]),
    }
    report = comfy.run(graph).outputs["99"]["report"][0]
    assert report["family"] == "SD 1.x"
    assert "quantised to packed bytes, as GGUF and nf4 are" in report["said"]


def test_a_base_in_fp8_is_trained_as_it_is(comfy: ComfyClient, images: list[str]) -> None:
    """With kohya's names and Stable Diffusion's metadata, and a text encoder that stays frozen."""
    graph: Graph = {
        "1": node("CheckpointLoaderSimple", ckpt_name="tiny15.safetensors"),
        "8": _unet("plain", "fp8_e4m3fn"),
        "10": subject_node(images),
        "11": train_node(model=("8", 0), seed=988, output_name="on_fp8"),
    }
    shown = comfy.run(graph).outputs["11"]["subjectbooth"][0]
    assert shown["matched"] == shown["layers"] > 20
    file = comfy.server.models_dir / "loras" / shown["lora"]
    with safetensors.safe_open(file, "pt") as content:
        assert all(name.startswith("lora_unet_") for name in content.keys())
        assert content.metadata()["ss_base_model_version"] == "sd_v1"
    graph["13"] = node("DreamBoothOptions", **{**comfy.defaults("DreamBoothOptions"), "train_text_encoder": True})
    graph["11"]["inputs"]["options"] = ["13", 0]
    with pytest.raises(NodeFailed, match="train_text_encoder with SD 1.x. Required: "):
        comfy.run(graph)
