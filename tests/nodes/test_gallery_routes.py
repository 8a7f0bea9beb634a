"""The gallery over the API: a real run is listed, its steps become files, a sweep is drawn, and it is deleted."""

from __future__ import annotations

import io
import json
import urllib.error
import urllib.parse
import urllib.request
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from subjectbooth.tests.comfy_server import ComfyClient
from subjectbooth.tests.conftest import module_alone
from subjectbooth.tests.nodes.graphs import node, text_to_image
from subjectbooth.tests.nodes.training_graphs import subject_node, train_node, upload_cat
from subjectbooth.trainer.files.lock import lock_folder
from subjectbooth.trainer.files.safetensors_file import read_metadata

ROOT = Path(__file__).resolve().parents[2]


def ask(comfy: ComfyClient, method: str, path: str, body: Any = None) -> tuple[int, Any]:
    """Status and answer; parsed if it is JSON."""
    data = None if body is None else json.dumps(body).encode()
    request = urllib.request.Request(
        f"{comfy.url}/subjectbooth{urllib.parse.quote(path, safe='/?=')}", data=data, method=method
    )
    try:
        with urllib.request.urlopen(request, timeout=60) as answer:
            content, kind = answer.read(), answer.headers["Content-Type"]
            return answer.status, json.loads(content) if kind.startswith("application/json") else content
    except urllib.error.HTTPError as error:
        return error.code, json.loads(error.read())


def listed(comfy: ComfyClient) -> dict[str, dict[str, Any]]:
    status, said = ask(comfy, "GET", "/gallery")
    assert status == 200
    return {run["lora"]: run for run in said["runs"]}


def pixels(comfy: ComfyClient, image: dict[str, str]) -> np.ndarray:
    content = comfy.view(image["filename"], image["subfolder"], image["type"])
    return np.asarray(Image.open(io.BytesIO(content)), dtype=np.float32)


def test_a_run_from_the_list_to_its_end(comfy: ComfyClient) -> None:
    assert comfy.server is not None
    options = {**comfy.defaults("DreamBoothOptions"), "validation_steps": 1}
    graph = {
        "1": node("CheckpointLoaderSimple", ckpt_name="tiny15.safetensors"),
        "10": subject_node(upload_cat(comfy)),
        "11": train_node(
            steps=4, seed=3001, learning_rate=0.001, output_name="shelf/rex", validation_interval=2,
            validation_prompts="a photo of {subject}", options=["9", 0],
        ),
        "9": node("DreamBoothOptions", **options),
    }  # fmt: skip
    comfy.run(graph)
    run = listed(comfy)["shelf/rex.safetensors"]
    folder = comfy.server.output_dir / "subjectbooth" / run["run"]
    assert (run["trigger"], run["step"], run["steps"], run["why"]) == ("ohwx cat", 4, 4, "last")
    assert (run["base"], run["file"], run["resolution"], run["rank"]) == ("sd_v1", "tiny15.safetensors", 64, 4)
    assert (run["saved"], run["pictures"], run["active"]) == (2, 2, False)
    assert run["size"] == sum(path.stat().st_size for path in folder.rglob("*") if path.is_file())

    # What such a run takes is known from now on; nothing is queued for it.
    status, said = ask(comfy, "POST", "/estimate", {"prompt": graph, "node": "11"})
    assert status == 200 and (said["known"], said["run"], said["scaled"], said["fits"]) == (
        True,
        run["run"],
        False,
        True,
    )
    assert 0 < said["step"] * 4 < said["seconds"] and 0 < said["needed"] < said["free"]
    twice = {**graph, "11": {**graph["11"], "inputs": {**graph["11"]["inputs"], "train_batch_size": 2}}}
    scaled = ask(comfy, "POST", "/estimate", {"prompt": twice, "node": "11"})[1]
    assert scaled["scaled"] and scaled["step"] == pytest.approx(2 * said["step"])
    other = {**graph, "1": node("CheckpointLoaderSimple", ckpt_name="other.safetensors")}
    assert ask(comfy, "POST", "/estimate", {"prompt": other, "node": "11"})[1] == {"known": False}
    # A rank of 0 is what is usual for the family, which the run has noted; a preset replaces the node's values.
    noted = json.loads((folder / "base.json").read_text("utf-8"))
    assert noted["family"] == "SD 1.x"

    def needed(**values: Any) -> int:
        changed = {**graph, "11": {**graph["11"], "inputs": {**graph["11"]["inputs"], **values}}}
        return int(ask(comfy, "POST", "/estimate", {"prompt": changed, "node": "11"})[1]["needed"])

    assert needed(rank=0, network_alpha=0) == needed(rank=16) < needed(rank=32) == needed(preset="face")
    (folder / "base.json").write_text(json.dumps({**noted, "family": "Z-Image"}), "utf-8")
    assert needed(rank=0, network_alpha=0) == needed(rank=32)
    (folder / "base.json").write_text(json.dumps(noted), "utf-8")
    for wrong in ({}, {"prompt": [], "node": "11"}, {"prompt": graph, "node": 11}, {"prompt": graph, "node": "99"},
                  {"prompt": {"11": {"class_type": "x"}}, "node": "11"}):  # fmt: skip
        assert ask(comfy, "POST", "/estimate", wrong)[0] == 400
    bad = {**graph, "11": {**graph["11"], "inputs": {**graph["11"]["inputs"], "steps": -1}}}
    status, said = ask(comfy, "POST", "/estimate", {"prompt": bad, "node": "11"})
    assert status == 400 and "steps" in said["error"]

    status, picture = ask(comfy, "GET", f"/runs/{run['run']}/thumbnail?v={run['thumbnail']}")
    shown = np.asarray(Image.open(io.BytesIO(picture)), dtype=np.float32)
    drawn = np.asarray(Image.open(folder / "validation" / "step_000004_00.png"), dtype=np.float32)
    assert status == 200 and shown.shape == drawn.shape == (64, 64, 3)

    assert ask(comfy, "POST", f"/runs/{run['run']}/publish", {})[1] == {
        "lora": str(Path("shelf/rex.safetensors")),
        "step": 4,
    }
    name = str(Path("shelf/rex_step_2.safetensors"))
    assert ask(comfy, "POST", f"/runs/{run['run']}/publish", {"step": 2}) == (200, {"lora": name, "step": 2})
    loras = comfy.server.models_dir / "loras"
    assert read_metadata(loras / name)["subjectbooth.step"] == "2"
    assert read_metadata(loras / "shelf" / "rex.safetensors")["subjectbooth.step"] == "4", (
        "the trainer's own file stays"
    )
    for step in (3, "2", True, None, -1, 10**30):
        status, said = ask(comfy, "POST", f"/runs/{run['run']}/publish", {"step": step})
        assert status == 400 and "has not kept the LoRA" in said["error"] and "2, 4" in said["error"], step

    status, sweep = ask(comfy, "POST", f"/runs/{run['run']}/sweep", {"step": 2})
    assert status == 200 and all(int(node_id) > 9_000_000 for node_id in sweep["prompt"])
    saving = [node_id for node_id, saved in sweep["prompt"].items() if saved["class_type"] == "SaveImage"]
    assert len(saving) == 6
    for node_id in saving[2::2] + saving[3:4]:  # three of six are enough here
        del sweep["prompt"][node_id]
    for drawn_by in sweep["prompt"].values():
        if drawn_by["class_type"] == "KSampler":
            drawn_by["inputs"]["steps"] = 2
    comfy.run(sweep["prompt"])
    (made,) = ask(comfy, "GET", f"/runs/{run['run']}/sweep")[1]["sweeps"]
    assert (made["step"], made["prompts"]) == (2, ["a photo of {subject}"])
    assert made["strengths"] == [0.0, 0.25, 0.5, 0.75, 1.0, 1.25]
    ((*row,),) = made["images"]
    assert [image is not None for image in row] == [True, True, False, False, False, True]
    pictures = [pixels(comfy, image) for image in row if image is not None]
    plain = text_to_image(seed=0, steps=2, cfg=7.0, prompt="a photo of ohwx cat")
    base = pixels(comfy, comfy.run(plain).outputs["7"]["images"][0])
    assert np.array_equal(pictures[0], base), "strength 0 is the base"
    moved = [float(np.abs(other - base).mean()) for other in pictures]
    assert moved == sorted(set(moved)), "the stronger, the further from it"

    assert ask(comfy, "POST", f"/runs/{run['run']}/open")[1] == {"opened": False, "path": str(folder)}, "no desktop"
    with lock_folder(folder):
        status, said = ask(comfy, "DELETE", f"/runs/{run['run']}")
        assert status == 400 and "is in training" in said["error"] and folder.is_dir()
    size = listed(comfy)["shelf/rex.safetensors"]["size"]
    assert size > run["size"], "with the sweep"
    assert ask(comfy, "DELETE", f"/runs/{run['run']}") == (200, {"freed": size})
    assert not folder.exists() and (loras / "shelf" / "rex.safetensors").is_file()
    assert "shelf/rex.safetensors" not in listed(comfy)
    assert ask(comfy, "DELETE", f"/runs/{run['run']}")[0] == 404


def test_a_run_without_its_base_asks_for_one(comfy: ComfyClient, tmp_path: Path) -> None:
    """As of an earlier version; a client may send what its own graph loads."""
    assert comfy.server is not None
    from subjectbooth.tests.trainer.runs.test_gallery import _run

    run = _run(comfy.server.output_dir / "subjectbooth", 77, 1000)
    try:
        path = f"/runs/{run.path.name}/sweep"
        status, said = ask(comfy, "POST", path, {"step": 100})
        assert status == 409 and "open a workflow" in said["error"]
        loader = {"1": node("CheckpointLoaderSimple", ckpt_name="tiny15.safetensors")}
        base = {"nodes": loader, "model": ["1", 0], "clip": ["1", 1], "vae": ["1", 2]}
        status, said = ask(comfy, "POST", path, {"step": 100, "base": base})
        assert status == 200
        kinds = sorted(made["class_type"] for made in said["prompt"].values())
        assert kinds.count("KSampler") == kinds.count("SaveImage") == kinds.count("ApplySubjectLoRA") == 6
        for wrong in ({}, [], {**base, "vae": ["2", 2]}, {**base, "nodes": {"1": {}}}, {**base, "clip": None}):
            assert ask(comfy, "POST", path, {"step": 100, "base": wrong})[0] == 409
    finally:
        assert ask(comfy, "DELETE", f"/runs/{run.path.name}")[0] == 200
        for file in (comfy.server.models_dir / "loras").glob(f"{run.path.name[:-13]}*"):
            file.unlink()


BASE = module_alone("base_graph")
PROMPT = {
    "1": node("UNETLoader", unet_name="flux\\flux1-dev.safetensors"),
    "2": node("ModelSamplingFlux", model=["1", 0], max_shift=1.15),
    "3": node("DualCLIPLoader", clip_name1="t5xxl.safetensors"),
    "4": node("VAELoader", vae_name="ae.safetensors"),
    "5": node("SaveImage", images=["9", 0]),
    "11": node("DreamBoothLoRATrain", model=["2", 0], clip=["3", 0], vae=["4", 0], subject=["10", 0]),
}


def test_the_base_is_what_the_three_inputs_hang_on() -> None:
    found = BASE.base_graph(PROMPT, "11")
    assert found is not None and sorted(found["nodes"]) == ["1", "2", "3", "4"]
    assert (found["model"], found["clip"], found["vae"]) == (["2", 0], ["3", 0], ["4", 0])
    assert BASE.is_base_graph(json.loads(json.dumps(found))) and BASE.base_file(found) == "flux1-dev.safetensors"


@pytest.mark.parametrize(
    "changes",
    [
        {"2": node("ApplySubjectLoRA", model=["12", 0])},
        {"2": node("SomeNode", model=["1", 0], other=["13", 0]), "13": node("DreamBoothLoRATrain", model=["1", 0])},
        {"2": node("ModelSamplingFlux", model=["1", 0], text="x" * 60_000)},
        {"11": node("DreamBoothLoRATrain", model=["2", 0], clip=["3", 0])},
    ],
)
def test_a_base_that_cannot_be_drawn_with_is_not_kept(changes: dict[str, Any]) -> None:
    assert BASE.base_graph({**PROMPT, **changes}, "11") is None
    assert BASE.base_graph(PROMPT, "7") is None and BASE.base_graph(None, None) is None
