"""ComfyUI, its output and the pack in folders with spaces, Cyrillic and emoji in their names."""

from __future__ import annotations

import json
import urllib.parse
from collections.abc import Callable
from pathlib import Path

import pytest
from PIL import Image

from subjectbooth.tests.comfy_server import FP32_FLAGS, ComfyClient, ComfyServer
from subjectbooth.tests.conftest import PACKS
from subjectbooth.tests.fuzzing import files_below
from subjectbooth.tests.nodes.graphs import node
from subjectbooth.tests.nodes.training_graphs import SIZE, cat_photos, train_and_sample
from subjectbooth.tests.shipped import copy_shipped
from subjectbooth.trainer.files.safetensors_file import read_metadata
from subjectbooth.trainer.runs.cleanup import remembered_lora_folders


@pytest.fixture(scope="module")
def packs(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """The pack as the Registry serves it: through a link to where the tests are it would still see its usual place."""
    copy = tmp_path_factory.mktemp("мои паки 🐱") / "Subject Booth"
    return {**PACKS, "SubjectBooth": copy_shipped(copy)}


@pytest.mark.slow
def test_train_and_sample(comfy_factory: Callable[..., ComfyServer], packs: dict[str, Path], tmp_path: Path) -> None:
    output = tmp_path / "вывод 🖼 of it"
    drive = tmp_path / "another drive é" / "loras"
    drive.mkdir(parents=True)
    config = tmp_path / "extra_model_paths.yaml"
    config.write_text(json.dumps({"drive": {"loras": str(drive)}}), encoding="utf-8")  # any JSON is YAML
    args = [*FP32_FLAGS, "--output-directory", str(output), "--extra-model-paths-config", str(config)]
    base = tmp_path / "ComfyUI мой 🐶 folder, 100% [it's new] #1 & co"
    server = comfy_factory(args=args, base_dir=base, packs=packs)
    with server, ComfyClient(server.url, server) as comfy:
        names = [comfy.upload_image(photo, f"мой кот 🐱 {number}.png") for number, photo in enumerate(cat_photos())]
        graph = train_and_sample(
            names,
            steps=2,
            output_name="мой кот/рекс 🐶",
            class_priors=["20", 0],
            validation_prompts="a photo of {subject}",
            validation_interval=1,
        )
        graph["20"] = node(
            "GenerateClassPriors",
            model=["1", 0],
            clip=["1", 1],
            vae=["1", 2],
            subject=["10", 0],
            class_prompt="a photo of a {class}, чёрно-белая 🐈",
            negative="",
            count=1,
            steps=1,
            cfg=1.0,
            sampler_name="euler",
            scheduler="normal",
            seed=5,
            batch_size=1,
            exclude="",
        )
        done = comfy.run(graph)

        (picture,) = done.images("7")
        assert picture["type"] == "output"
        with Image.open(output / picture["subfolder"] / picture["filename"]) as shown:
            assert shown.size == (SIZE, SIZE)
        lora = server.models_dir / "loras" / "мой кот" / "рекс 🐶.safetensors"
        assert read_metadata(lora)["subjectbooth.step"] == "2"

        said = done.outputs["11"]["subjectbooth"][0]
        assert set(remembered_lora_folders(output / "subjectbooth")) == {server.models_dir / "loras", drive}
        run = output / "subjectbooth" / said["run"]
        assert {"run.json", "events.jsonl", "checkpoint.safetensors"} <= {path.name for path in run.iterdir()}
        history = comfy.request("GET", f"/subjectbooth/runs/{urllib.parse.quote(said['run'])}/events")
        assert [validation["step"] for validation in history["validations"]] == [1, 2]
        (class_image,) = done.outputs["20"]["images"]
        for image in (*history["validations"][0]["images"], class_image):
            assert comfy.view(**image)[:4] == b"\x89PNG"
        name = lora.relative_to(server.models_dir / "loras")
        described = comfy.request("GET", "/subjectbooth/lora?" + urllib.parse.urlencode({"name": str(name)}))
        assert described["ours"] and described["thumbnail"]
    with server, ComfyClient(server.url, server) as comfy:  # started again there, it finds the run and the file
        again = comfy.run(graph)
        assert again.outputs["11"]["text"][0].startswith("reused")
        graph["12"]["inputs"]["lora_name"] = str(name)
        del graph["12"]["inputs"]["subject_lora"]
        assert comfy.run(graph).images("7")
    assert not files_below(base / "output"), "everything is in the folder that was asked for"
