"""The harness itself: a real ComfyUI samples the tiny model, and says readably what went wrong."""

from __future__ import annotations

import io
from collections.abc import Callable

import numpy as np
import pytest
from PIL import Image

from subjectbooth.tests.comfy_server import (
    ComfyClient,
    ComfyServer,
    Interrupted,
    NodeFailed,
    PromptRejected,
)
from subjectbooth.tests.nodes.graphs import node, text_to_image


def pixels(comfy: ComfyClient, record: dict[str, str]) -> np.ndarray:
    return np.asarray(Image.open(io.BytesIO(comfy.view(**record))).convert("RGB"), dtype=np.float64)


def test_tiny_model_samples_a_picture(comfy: ComfyClient) -> None:
    graph = text_to_image(seed=100)
    graph["8"] = node("ProbeImage", value=["6", 0])
    result = comfy.run(graph)
    report = result.outputs["8"]["report"][0]
    assert report["finite"]
    assert report["shape"] == [1, 64, 64, 3]
    picture = pixels(comfy, result.images("7")[0])
    assert picture.shape == (64, 64, 3)
    assert picture.std() > 5, "the picture is (nearly) one colour"
    assert 5 < picture.mean() < 250
    progress = [e.data for e in result.of_type("progress") if e.data["node"] == "5"]
    assert (progress[-1]["value"], progress[-1]["max"]) == (2, 2)


def test_prompt_style_lora_and_seed_matter(comfy: ComfyClient) -> None:
    """Tests that compare pictures are worth something only when the tiny model listens to its inputs."""

    def sample(**changes: object) -> str:
        graph = text_to_image(**{"seed": 101, "prompt": "a photo of a dog", **changes})  # type: ignore[arg-type]
        graph["8"] = node("ProbeImage", value=["5", 0])
        graph["9"] = node(
            "LoraLoader",
            model=["1", 0],
            clip=["1", 1],
            lora_name="tiny_style.safetensors",
            strength_model=1.0,
            strength_clip=1.0,
        )
        return str(comfy.run(graph).outputs["8"]["report"][0]["sha256"])

    base = sample()
    assert sample() == base
    assert sample(prompt="a photo of a cat") != base
    assert sample(seed=102) != base
    assert sample(model=["9", 0]) != base
    assert sample(clip=["9", 1]) != base
    assert sample() == base


def test_autoencoder_keeps_the_picture(comfy: ComfyClient) -> None:
    """Encoded and decoded, a photograph is a blurred copy of itself."""
    from skimage import data

    photo = Image.fromarray(data.chelsea()).resize((64, 64), Image.Resampling.LANCZOS)
    stream = io.BytesIO()
    photo.save(stream, "PNG")
    name = comfy.upload_image(stream.getvalue(), "harness_cat.png")
    graph = {
        "1": node("CheckpointLoaderSimple", ckpt_name="tiny15.safetensors"),
        "2": node("LoadImage", image=name),
        "3": node("VAEEncode", pixels=["2", 0], vae=["1", 2]),
        "4": node("ProbeImage", value=["3", 0]),
        "5": node("VAEDecode", samples=["3", 0], vae=["1", 2]),
        "6": node("SaveImage", images=["5", 0], filename_prefix="roundtrip"),
    }
    result = comfy.run(graph)
    latents = result.outputs["4"]["report"][0]
    assert latents["shape"] == [1, 4, 8, 8]
    assert 0.1 < latents["std"] * 0.18215 < 3, "scaled latents are far from the unit size a UNet expects"
    blocks = np.asarray(photo, dtype=np.float64).reshape(8, 8, 8, 8, 3).mean((1, 3))
    back = pixels(comfy, result.images("6")[0]).reshape(8, 8, 8, 8, 3).mean((1, 3))
    assert np.corrcoef(blocks.ravel(), back.ravel())[0, 1] > 0.9


def test_second_run_is_cached(comfy: ComfyClient) -> None:
    graph = text_to_image(seed=103)
    first = comfy.run(graph)
    assert "5" in first.executed()
    graph["7"]["inputs"]["filename_prefix"] = "other"
    second = comfy.run(graph)
    assert {"1", "5", "6"} <= second.cached
    assert second.executed() == ["7"]


def test_refusal_names_node_and_input(comfy: ComfyClient) -> None:
    graph = text_to_image(seed=104)
    graph["5"]["inputs"]["steps"] = "many"
    with pytest.raises(PromptRejected, match=r"KSampler \(node 5\).*steps"):
        comfy.queue(graph)


def test_node_error_carries_its_message(comfy: ComfyClient) -> None:
    graph = text_to_image(seed=105)
    graph["5"]["inputs"]["latent_image"] = ["9", 0]
    graph["9"] = node("LatentCrop", samples=["4", 0], width=64, height=64, x=0, y=0)
    graph["2"]["inputs"]["clip"] = ["10", 0]
    graph["10"] = node("CLIPLoader", clip_name="missing.safetensors", type="stable_diffusion")
    with pytest.raises(PromptRejected, match="missing.safetensors"):
        comfy.queue(graph)
    graph = text_to_image(seed=105)
    graph["9"] = node("ProbeFail", message="the reason")
    with pytest.raises(NodeFailed, match="ProbeFail .node 9. failed.*the reason") as failure:
        comfy.run(graph)
    assert (failure.value.node_id, failure.value.node_message) == ("9", "the reason")


def test_interrupt_ends_a_run(comfy: ComfyClient) -> None:
    graph = text_to_image(seed=106, steps=4000)
    since = len(comfy.events)
    prompt_id = comfy.queue(graph)
    comfy.wait_event(lambda e: e.type == "progress" and e.prompt_id == prompt_id, since=since)
    comfy.interrupt()
    with pytest.raises(Interrupted):
        comfy.wait(prompt_id, timeout=30)


def test_state_probe_counts_models(comfy: ComfyClient) -> None:
    graph = text_to_image(seed=107)
    graph["8"] = node("ProbeState", after=["6", 0])
    report = comfy.run(graph).outputs["8"]["report"][0]
    assert report["inference_mode"] is True
    assert "BaseModel" in report["loaded_model_types"]
    assert report["parameters"] > 25e6
    comfy.free()
    freed = comfy.run({"1": node("ProbeState")}).outputs["1"]["report"][0]
    assert freed["loaded_models"] == 0
    assert freed["parameters"] < 1e6


def test_own_server_restarts_on_its_folders(comfy_factory: Callable[..., ComfyServer]) -> None:
    with comfy_factory() as server, ComfyClient(server.url, server) as client:
        first = client.run(text_to_image(seed=108))
        server.restart()
        second = client.run(text_to_image(seed=108))
        assert "5" in second.executed(), "a new process cannot have the old one's cache"
        pictures = [client.view(**r.images("7")[0]) for r in (first, second)]
        assert first.images("7") != second.images("7")
        assert np.array_equal(*[np.asarray(Image.open(io.BytesIO(p))) for p in pictures])
