"""LoadDemoBase in the real ComfyUI: what it gives is the narrow model, from the noise to the picture."""

from __future__ import annotations

import io
import shutil

import numpy as np
import pytest
import torch
from PIL import Image

from subjectbooth.demo import base
from subjectbooth.demo.making.classes import caption
from subjectbooth.demo.making.narrow import load_narrow
from subjectbooth.demo.making.schedule import sample
from subjectbooth.tests.comfy_server import ComfyClient, NodeFailed
from subjectbooth.tests.nodes.graphs import node, text_to_image


def _pixels(client: ComfyClient, image: dict[str, str]) -> torch.Tensor:
    picture = Image.open(io.BytesIO(client.view(**image))).convert("RGB")
    return torch.from_numpy(np.array(picture)).permute(2, 0, 1).float()


def test_comfyui_draws_what_the_narrow_model_draws(comfy: ComfyClient) -> None:
    prompt = caption("dog", "blue")
    graph = text_to_image(prompt=prompt, seed=7, steps=12, cfg=4.0)
    graph["1"] = node("LoadDemoBase")
    result = comfy.run(graph)
    drawn = _pixels(comfy, result.images("7")[0])
    nets = load_narrow()
    latents = sample(nets.unet, nets.text, [prompt], [7], steps=12, cfg=4.0)
    expected = nets.decoder(latents)[0].clamp(0, 1) * 255
    assert drawn.shape == expected.shape
    assert expected.std() > 20
    # ComfyUI saves 8 bits, rounded down.
    assert (drawn - expected).abs().max() < 2.5


def test_ordinary_loaders_list_the_same_file(comfy: ComfyClient) -> None:
    comfy.run({"1": node("LoadDemoBase"), **_save(["1", 0], ["1", 1], ["1", 2])})
    assert comfy.server is not None
    path = comfy.server.models_dir / "checkpoints" / "subjectbooth" / base.NAME
    assert base.sha256_of(path) == base.manifest()["checkpoint"]
    options = comfy.object_info("CheckpointLoaderSimple")["input"]["required"]["ckpt_name"][0]
    assert any(base.NAME in name for name in options)


def _save(model: list[object], clip: list[object], vae: list[object]) -> dict[str, dict[str, object]]:
    graph = text_to_image(steps=1, model=model, clip=clip)
    graph.pop("1")
    graph["6"]["inputs"]["vae"] = vae
    return graph


def test_the_size_of_the_file_is_announced_where_it_is_written(comfy: ComfyClient) -> None:
    """All checkpoints are moved aside for a moment, as in a base directory in which nothing is yet."""
    assert comfy.server is not None
    checkpoints = comfy.server.models_dir / "checkpoints"
    folder = checkpoints / "subjectbooth"
    aside = checkpoints.rename(checkpoints.with_name("aside"))
    try:
        comfy.free()
        result = comfy.run({"1": node("LoadDemoBase"), **_save(["1", 0], ["1", 1], ["1", 2])})
        texts = [event.data["text"] for event in result.of_type("progress_text")]
        assert texts[:2] == [
            "writing 466 MB, once, to models/checkpoints/subjectbooth",
            "466 MB written to models/checkpoints/subjectbooth",
        ]
        assert round((folder / base.NAME).stat().st_size / 1e6) == 466
    finally:
        shutil.rmtree(checkpoints, ignore_errors=True)
        aside.rename(checkpoints)


def test_a_folder_that_cannot_be_written_is_told_in_a_sentence(comfy: ComfyClient) -> None:
    assert comfy.server is not None
    folder = comfy.server.models_dir / "checkpoints" / "subjectbooth"
    aside = folder.with_name("aside")
    if folder.exists():
        folder.rename(aside)
    folder.write_text("a file where the folder should be")
    comfy.free()  # or ComfyUI gives what the node gave in another test
    try:
        with pytest.raises(
            NodeFailed, match="demo base cannot be written .*. Required: 460 MB of disk space"
        ) as failed:
            comfy.run({"1": node("LoadDemoBase"), **_save(["1", 0], ["1", 1], ["1", 2])})
    finally:
        folder.unlink()
        if aside.exists():
            aside.rename(folder)
    assert failed.value.exception_type.endswith("SubjectBoothError")
