"""A trained text encoder sees what ComfyUI's sampler will show it, and its LoRA means the same in both."""

from __future__ import annotations

import json

import pytest

from subjectbooth.tests.comfy_server import ComfyClient, NodeFailed
from subjectbooth.tests.nodes.graphs import node
from subjectbooth.tests.nodes.training_graphs import apply_node, subject_node, train_node, upload_cat

LONG = ", ".join(["a photo of an (ohwx:1.3) cat on a blue blanket beside a window"] * 9)


def _options(client: ComfyClient, **changes: object) -> dict[str, object]:
    return node("DreamBoothOptions", **{**client.defaults("DreamBoothOptions"), **changes})


def test_prompts_are_encoded_as_comfyui_does(comfy: ComfyClient) -> None:
    graph = {
        "1": node("CheckpointLoaderSimple", ckpt_name="tiny15.safetensors"),
        "8": node("CLIPSetLastLayer", clip=["1", 1], stop_at_clip_layer=-2),
        "7": node("CLIPSetLastLayer", clip=["1", 1], stop_at_clip_layer=-12),
        "6": node("CLIPSetLastLayer", clip=["1", 1], stop_at_clip_layer=-14),
        "9": node(
            "LoraLoader",
            model=["1", 0],
            clip=["1", 1],
            lora_name="tiny_style.safetensors",
            strength_model=0.8,
            strength_clip=0.8,
        ),
    }
    cases = [
        ("plain", ["1", 1], "a photo of ohwx cat"),
        ("weights", ["1", 1], "a (photo:1.4) of [ohwx] cat"),
        ("long", ["1", 1], LONG),
        ("empty", ["1", 1], ""),
        ("skip", ["8", 0], "a photo of ohwx cat"),
        ("first layer", ["7", 0], "a photo of ohwx cat"),
        ("past it", ["6", 0], "a photo of ohwx cat"),
        ("patched", ["9", 1], "a photo of ohwx cat"),
    ]
    for number, (_, clip, prompt) in enumerate(cases):
        graph[f"9{number}"] = node("ProbeText", model=["1", 0], clip=clip, prompt=prompt, nonce=number)
    result = comfy.run(graph)
    for number, (name, _, _) in enumerate(cases):
        report = result.outputs[f"9{number}"]["report"][0]
        assert report["difference"] < 1e-4 * max(1.0, report["scale"]), (name, report)
        assert report["scale"] > 0.5, name
        assert (report["tokens"] > 77) == (name == "long")


def test_a_trained_text_encoder_loads_key_by_key_and_encodes_the_same(comfy: ComfyClient) -> None:
    graph = {
        "1": node("CheckpointLoaderSimple", ckpt_name="tiny15.safetensors"),
        "10": subject_node(upload_cat(comfy)),
        "9": _options(comfy, train_text_encoder=True, text_encoder_lr=0.01, lora_targets="attention+mlp"),
        "11": train_node(steps=3, options=["9", 0], output_name="with_text"),
        "12": apply_node(),
        "99": node(
            "ProbeText",
            model=["1", 0],
            clip=["1", 1],
            prompt="a photo of ohwx cat",
            nonce=50,
            applied=["12", 1],
            subject_lora=["11", 0],
        ),
    }
    result = comfy.run(graph)
    content = (comfy.server.models_dir / "loras" / "with_text.safetensors").read_bytes()
    layers = {
        key.split(".")[0]
        for key in json.loads(content[8 : 8 + int.from_bytes(content[:8], "little")])
        if key != "__metadata__"
    }
    text_layers = [layer for layer in layers if layer.startswith("lora_te_text_model_encoder_layers_")]
    assert len(text_layers) == 12 * 6
    assert f"matched {len(layers)}/{len(layers)}" in result.outputs["11"]["text"][0]
    report = result.outputs["99"]["report"][0]
    assert report["effect"] > 0.01
    assert report["difference"] < 1e-4 * max(1.0, report["scale"])


def test_an_embedding_in_a_caption_is_refused_while_the_text_encoder_is_trained(comfy: ComfyClient) -> None:
    import safetensors.torch
    import torch

    folder = comfy.server.models_dir / "embeddings"
    folder.mkdir(exist_ok=True)
    safetensors.torch.save_file({"emb_params": torch.zeros(1, 768)}, folder / "nothing.safetensors")
    images = upload_cat(comfy)
    graph = {
        "1": node("CheckpointLoaderSimple", ckpt_name="tiny15.safetensors"),
        "10": subject_node(images, prompt_template="embedding:nothing photo of {token} {class}"),
        "9": _options(comfy, train_text_encoder=True),
        "11": train_node(steps=2, options=["9", 0], output_name="with_embedding"),
    }
    with pytest.raises(NodeFailed) as failure:
        comfy.run(graph)
    assert "remove the embedding" in failure.value.node_message.lower()
