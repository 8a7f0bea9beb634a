"""The main job in the real ComfyUI: what is wired is trained, what is trained is sampled, and nothing else changes."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from subjectbooth.tests.comfy_server import ComfyClient, NodeFailed
from subjectbooth.tests.nodes.graphs import Graph, node, text_to_image
from subjectbooth.tests.nodes.training_graphs import (
    apply_node,
    subject_node,
    train_and_sample,
    train_node,
    upload_cat,
)

STYLE = "tiny_style.safetensors"


def _report(client: ComfyClient, graph: Graph, node_id: str = "99") -> dict[str, Any]:
    return client.run(graph).outputs[node_id]["report"][0]


def _predictions(nonce: int, **inputs: Any) -> dict[str, Any]:
    defaults = {
        "model": ["1", 0],
        "clip": ["1", 1],
        "vae": ["1", 2],
        "image": ["10", 1],
        "prompt": "a photo of ohwx cat",
        "nonce": nonce,
    }
    return node("ProbePredictions", **{**defaults, **inputs})


def _picture(client: ComfyClient, graph: Graph) -> bytes:
    result = client.run(graph)
    return client.view(**result.images("7")[0])


def _lora(client: ComfyClient, name: str = "cat") -> Path:
    return client.server.models_dir / "loras" / f"{name}.safetensors"


@pytest.mark.oldest
def test_one_graph_trains_and_samples(comfy: ComfyClient) -> None:
    graph = train_and_sample(
        upload_cat(comfy),
        validation_prompts="a photo of {subject}\n{subject} on grass",
        validation_interval=2,
        output_name="main_job",
    )
    graph["20"] = node("SaveImage", images=["11", 2], filename_prefix="validation")
    graph["21"] = node("LossGraphNode", loss=["11", 4], filename_prefix="loss")
    graph["22"] = node("LoraModelLoader", **comfy.defaults("LoraModelLoader"), model=["1", 0], lora=["11", 3])
    graph["23"] = node("SaveLoRA", lora=["11", 3], prefix="loras/core_saved", steps=3)
    graph["24"] = node(
        "ProbePredictions",
        model=["1", 0],
        clip=["1", 1],
        vae=["1", 2],
        image=["10", 1],
        prompt="x",
        nonce=0,
        applied=["22", 0],
        subject_lora=["11", 0],
        strength=1.0,
    )
    graph["25"] = node("ProbeValue", value=["12", 2])
    graph["26"] = node("ProbeValue", value=["11", 1])
    result = comfy.run(graph)
    assert result.outputs["25"]["report"][0]["value"] == "a photo of ohwx cat"
    assert result.outputs["26"]["report"][0]["value"] == str(_lora(comfy, "main_job"))
    assert _lora(comfy, "main_job").is_file()
    assert len(result.images("20")) == 4  # steps 2 and 3, two prompts
    assert len(result.images("21")) == 1
    assert len(result.images("7")) == 1
    # The pictures on the trainer lie in the output folder, where they survive a restart.
    assert [entry["type"] for entry in result.images("11")] == ["output"] * 4
    assert all(comfy.view(**entry)[:4] == b"\x89PNG" for entry in result.images("11"))
    layers = len(_layers(_lora(comfy, "main_job")))
    assert f"matched {layers}/{layers}" in result.outputs["11"]["text"][0]
    core = result.outputs["24"]["report"][0]  # core's own loader samples what was trained
    assert core["difference"] < 1e-4
    assert core["effect"] > 1e-3
    # Found again with another prompt, it has no pictures of that one, and says so.
    graph["11"]["inputs"]["validation_prompts"] = "{subject} at night"
    again = comfy.run(graph)
    assert not again.outputs["11"].get("images")
    assert "reused" in again.outputs["11"]["text"][0]
    assert again.outputs["11"]["text"][1].startswith("no validation images of step 2, 3 for these prompts")


def _layers(path: Path) -> set[str]:
    return {key.split(".")[0] for key in json.loads(_header(path)) if key != "__metadata__"}


@pytest.mark.oldest
def test_the_prediction_without_adapter_is_comfyuis(comfy: ComfyClient) -> None:
    images = upload_cat(comfy)
    graph = {
        "1": node("CheckpointLoaderSimple", ckpt_name="tiny15.safetensors"),
        "10": subject_node(images),
        "99": _predictions(1),
    }
    plain = _report(comfy, graph)
    assert plain["difference"] < 1e-4
    assert plain["scale"] > 0.5

    styled = dict(graph)
    styled["8"] = node(
        "LoraLoader", model=["1", 0], clip=["1", 1], lora_name=STYLE, strength_model=0.7, strength_clip=0.7
    )
    styled["99"] = _predictions(2, model=["8", 0], clip=["8", 1])
    with_style = _report(comfy, styled)
    assert with_style["difference"] < 1e-4
    assert with_style["digest"] != plain["digest"]

    # After a trained subject was sampled in this server, the shared module has held its weights.
    comfy.run(train_and_sample(images, seed=77, output_name="sampled_before"))
    again = _report(comfy, {**graph, "99": _predictions(3)})
    assert again["difference"] < 1e-4
    assert again["digest"] == plain["digest"]


@pytest.mark.parametrize("kind", ["eps", "v_prediction"])
def test_a_wired_model_sampling_is_followed(comfy: ComfyClient, kind: str) -> None:
    graph = {
        "1": node("CheckpointLoaderSimple", ckpt_name="tiny15.safetensors"),
        "10": subject_node(upload_cat(comfy)),
        "8": node("ModelSamplingDiscrete", model=["1", 0], sampling=kind, zsnr=True),
        "99": _predictions(4, model=["8", 0]),
    }
    assert _report(comfy, graph)["difference"] < 1e-4


def test_a_model_sampling_that_cannot_be_trained_is_refused(comfy: ComfyClient) -> None:
    graph = {
        "1": node("CheckpointLoaderSimple", ckpt_name="tiny15.safetensors"),
        "10": subject_node(upload_cat(comfy)),
        "8": node("ModelSamplingDiscrete", model=["1", 0], sampling="lcm", zsnr=False),
        "11": train_node(model=("8", 0)),
    }
    with pytest.raises(NodeFailed) as failure:
        comfy.run(graph)
    assert "a model that predicts epsilon" in failure.value.node_message


def test_patches_that_are_not_weights_are_refused(comfy: ComfyClient) -> None:
    graph = {
        "1": node("CheckpointLoaderSimple", ckpt_name="tiny15.safetensors"),
        "10": subject_node(upload_cat(comfy)),
        "8": node("FreeU", model=["1", 0], b1=1.1, b2=1.2, s1=0.9, s2=0.2),
        "11": train_node(model=("8", 0)),
    }
    with pytest.raises(NodeFailed) as failure:
        comfy.run(graph)
    assert "patches that are not weights" in failure.value.node_message


@pytest.mark.oldest
def test_the_adapter_predicts_the_same_in_comfyui_and_in_the_trainer(comfy: ComfyClient) -> None:
    images = upload_cat(comfy)
    for nonce, strength in enumerate((1.0, 0.6, -0.5, 1.7), start=10):
        graph = {
            "1": node("CheckpointLoaderSimple", ckpt_name="tiny15.safetensors"),
            "10": subject_node(images),
            "11": train_node(learning_rate=0.02, steps=4, output_name="strengths"),
            "12": apply_node(strength_model=strength),
            "99": _predictions(nonce, applied=["12", 0], subject_lora=["11", 0], strength=strength),
        }
        report = _report(comfy, graph)
        assert report["difference"] < 1e-4, strength
        assert report["effect"] > 0.01, strength


def test_wired_models_are_unchanged_and_strength_0_is_no_node_at_all(comfy: ComfyClient) -> None:
    images = upload_cat(comfy)
    before = _picture(comfy, text_to_image(seed=501, prompt="a photo of ohwx cat"))
    trained = _picture(comfy, train_and_sample(images, seed=501, learning_rate=0.02, output_name="unchanged"))
    zero = _picture(
        comfy,
        train_and_sample(
            images,
            seed=501,
            learning_rate=0.02,
            output_name="unchanged",
            apply={"strength_model": 0.0, "strength_clip": 0.0},
        ),
    )
    comfy.free()  # so that nothing comes out of ComfyUI's cache
    after = _picture(comfy, text_to_image(seed=501, prompt="a photo of ohwx cat"))
    pixels = [_pixels(picture) for picture in (before, trained, zero, after)]
    assert pixels[0] == pixels[3]
    assert pixels[0] == pixels[2]
    assert pixels[0] != pixels[1]


def _pixels(png: bytes) -> bytes:
    import io

    from PIL import Image

    return Image.open(io.BytesIO(png)).convert("RGB").tobytes()


def test_a_forced_second_training_writes_the_same_bytes_after_sampling(comfy: ComfyClient) -> None:
    images = upload_cat(comfy)
    comfy.run(train_and_sample(images, seed=601, learning_rate=0.01, output_name="forced"))
    first = _lora(comfy, "forced").read_bytes()
    for _ in range(2):  # the same graph again: nothing of ComfyUI's cache answers for a forced training
        result = comfy.run(
            train_and_sample(images, seed=602, learning_rate=0.01, output_name="forced", force_retrain=True)
        )
        assert "11" not in result.cached
        assert result.outputs["11"]["text"][0].startswith("trained:")
    assert _lora(comfy, "forced").read_bytes() == first
    assert not _lora(comfy, "forced_2").exists()


@pytest.mark.oldest
def test_it_learns(comfy: ComfyClient) -> None:
    images = upload_cat(comfy)
    graph = {
        "1": node("CheckpointLoaderSimple", ckpt_name="tiny15.safetensors"),
        "10": subject_node(images),
        "11": train_node(
            steps=60, learning_rate=0.01, train_batch_size=2, rank=8, network_alpha=8.0, output_name="learned"
        ),
        "12": apply_node(),
    }
    for name, model in (("97", ["1", 0]), ("98", ["12", 0])):
        graph[name] = node(
            "ProbeFixedLoss", model=model, clip=["1", 1], vae=["1", 2], image=["10", 1], prompt="a photo of ohwx cat"
        )
    result = comfy.run(graph, timeout=600)
    before, after = (result.outputs[name]["report"][0]["loss"] for name in ("97", "98"))
    print(f"loss on 16 fixed pairs: {before:.4f} -> {after:.4f}")
    assert after <= 0.8 * before


def test_nothing_is_trained_twice(comfy: ComfyClient) -> None:
    images = upload_cat(comfy)
    first = comfy.run(train_and_sample(images, seed=701, steps=4, output_name="once"))
    assert "11" not in first.cached
    downstream = comfy.run(train_and_sample(images, seed=702, steps=4, output_name="once"))
    assert "11" in downstream.cached
    comfy.server.restart()
    after_restart = comfy.run(train_and_sample(images, seed=703, steps=4, output_name="once"))
    assert "11" not in after_restart.cached
    assert after_restart.outputs["11"]["text"][0].startswith("reused")
    renamed = [comfy.upload_image((comfy.server.input_dir / name).read_bytes(), f"renamed_{name}") for name in images]
    moved = comfy.run(train_and_sample(renamed, seed=704, steps=4, output_name="once_more"))
    assert moved.outputs["11"]["text"][0].startswith("reused")
    metadata = json.loads(_header(_lora(comfy, "once_more")))["__metadata__"]
    assert metadata["ss_output_name"] == "once_more"


def test_a_published_file_that_is_gone_comes_back_and_an_edited_one_is_kept(comfy: ComfyClient) -> None:
    """The inputs are the same each time, so ComfyUI's own cache would answer."""
    import safetensors.torch

    graph = {
        "1": node("CheckpointLoaderSimple", ckpt_name="tiny15.safetensors"),
        "10": subject_node(upload_cat(comfy)),
        "11": train_node(steps=4, output_name="gone"),
    }
    comfy.run(graph)
    path, second = _lora(comfy, "gone"), _lora(comfy, "gone_2")
    first = path.read_bytes()
    path.unlink()
    again = comfy.run(graph)
    assert again.outputs["11"]["text"][0].startswith("reused")
    assert path.read_bytes() == first
    assert "11" in comfy.run(graph).cached
    safetensors.torch.save_file(
        safetensors.torch.load_file(path),
        path,
        {**json.loads(_header(path))["__metadata__"], "description": "my best cat"},
    )
    edited = path.read_bytes()
    kept = comfy.run(graph)
    assert path.read_bytes() == edited
    assert second.is_file()
    assert kept.outputs["11"]["text"][:2] == [
        again.outputs["11"]["text"][0].replace("gone.safe", "gone_2.safe"),
        "gone.safetensors was edited after it was published and is kept: this LoRA is saved as gone_2.safetensors",
    ]
    assert "11" in comfy.run(graph).cached


def _header(path: Path) -> bytes:
    content = path.read_bytes()
    return content[8 : 8 + int.from_bytes(content[:8], "little")]


def test_a_file_of_another_run_is_never_overwritten(comfy: ComfyClient) -> None:
    images = upload_cat(comfy)
    foreign = _lora(comfy, "taken")
    foreign.write_bytes(b"somebody else's")
    comfy.run(train_and_sample(images, seed=801, output_name="taken", learning_rate=0.003))
    comfy.run(train_and_sample(images, seed=802, output_name="taken", learning_rate=0.004))
    comfy.run(train_and_sample(images, seed=803, output_name="taken", learning_rate=0.003, force_retrain=True))
    assert foreign.read_bytes() == b"somebody else's"
    names = sorted(path.name for path in foreign.parent.glob("taken*"))
    assert names == ["taken.safetensors", "taken_2.safetensors", "taken_3.safetensors"]


def test_progress_eta_and_preview_while_it_runs(comfy: ComfyClient) -> None:
    result = comfy.run(
        train_and_sample(
            upload_cat(comfy),
            seed=901,
            steps=60,
            output_name="watched",
            rank=5,
            validation_prompts="a photo of {subject}",
            validation_interval=30,
        )
    )
    steps = [event.data["value"] for event in result.of_type("progress") if event.data.get("node") == "11"]
    assert set(range(1, 61)) <= set(steps)
    texts = [str(event.data.get("text")) for event in result.of_type("progress_text")]
    assert any("step" in text and "ETA 0:0" in text and "loss" in text for text in texts), texts
    assert any(event.type.startswith("preview") or "preview" in event.type for event in result.events), {
        event.type for event in result.events
    }


def test_a_retrained_file_of_the_same_name_is_never_served_stale(comfy: ComfyClient) -> None:
    images = upload_cat(comfy)
    comfy.run(train_and_sample(images, seed=1, output_name="stale_source", learning_rate=0.02, steps=3))
    comfy.run(train_and_sample(images, seed=1, output_name="stale_other", learning_rate=0.02, steps=5, rank=3))
    target = _lora(comfy, "stale")
    graph = text_to_image(seed=1101, model=["12", 0], clip=["12", 1], positive=["12", 2])
    graph["12"] = apply_node(lora_name="stale.safetensors")
    del graph["12"]["inputs"]["subject_lora"]
    pictures = []
    for source in ("stale_source", "stale_other"):
        target.write_bytes(_lora(comfy, source).read_bytes())
        pictures.append(_pixels(_picture(comfy, graph)))
    assert pictures[0] != pictures[1]
    again = comfy.run(graph)
    assert "12" in again.cached  # and an unchanged one is not loaded again


def test_a_layer_that_comfyui_does_not_take_fails_the_run_by_name(comfy: ComfyClient) -> None:
    graph = {
        "1": node("CheckpointLoaderSimple", ckpt_name="tiny15.safetensors"),
        "10": subject_node(upload_cat(comfy)),
        "11": train_node(output_name="keys"),
        "99": node("ProbeKeys", model=["1", 0], clip=["1", 1], subject_lora=["11", 0]),
    }
    report = _report(comfy, graph)
    assert report["whole"] == report["layers"]
    assert "lora_unet_no_such_layer" in report["said"]
    assert f"only {report['layers']} of the LoRA's {report['layers'] + 1} layers" in report["said"]


def test_a_lora_of_another_family_is_refused(comfy: ComfyClient) -> None:
    import safetensors.torch
    import torch

    tensors = {
        "lora_unet_input_blocks_4_1_transformer_blocks_9_attn1_to_q.lora_down.weight": torch.zeros(4, 640),
        "lora_unet_input_blocks_4_1_transformer_blocks_9_attn1_to_q.lora_up.weight": torch.zeros(640, 4),
    }
    safetensors.torch.save_file(tensors, _lora(comfy, "foreign_family"))
    graph = text_to_image(seed=1, model=["12", 0], clip=["12", 1])
    graph["12"] = apply_node(lora_name="foreign_family.safetensors", prompt="plain")
    del graph["12"]["inputs"]["subject_lora"]
    with pytest.raises(NodeFailed) as failure:
        comfy.run(graph)
    assert "None of the LoRA's 1 layers fit this model" in failure.value.node_message
