"""What ships in example_workflows/ runs as it is, over the API, with fewer steps."""

from __future__ import annotations

import json
import re
import uuid
from pathlib import Path
from typing import Any

import pytest

from subjectbooth.demo.making.gain import CFG
from subjectbooth.demo.making.measure_dreambooth import (
    CLASS_CFG,
    DEFAULT_WAY,
    OPTIONS,
    SETTINGS,
    STEPS,
    WAYS,
    dreambooth_graph,
)
from subjectbooth.scripts.workflow import to_api
from subjectbooth.tests.comfy_server import ComfyClient, PromptRejected
from subjectbooth.tests.nodes import graphs

ROOT = Path(__file__).resolve().parent.parent.parent
EXAMPLES = sorted((ROOT / "example_workflows").glob("*.json"))
FEW: dict[str, dict[str, Any]] = {
    "GenerateClassPriors": {"count": 2, "steps": 2},
    "DreamBoothLoRATrain": {"steps": 4, "validation_interval": 2},
    "KSampler": {"steps": 2},
}
pytestmark = pytest.mark.skipif(
    not (ROOT / "demo" / "weights" / "demo_base.safetensors").is_file(), reason="the demo base is not trained yet"
)


def test_there_is_an_example_with_a_picture() -> None:
    assert ROOT / "example_workflows" / "train_and_sample.json" in EXAMPLES
    for path in EXAMPLES:
        assert path.with_suffix(".jpg").is_file(), f"{path.name} has no picture for the template browser"
        assert path.with_suffix(".jpg").stat().st_size <= 150_000


def test_every_example_has_an_id_of_its_own() -> None:
    """The training panel tells workflows apart by it, and the editor keeps the one that it opens, were it all zeros."""
    ids = [uuid.UUID(json.loads(path.read_text(encoding="utf-8"))["id"]) for path in EXAMPLES]
    assert len(set(ids)) == len(EXAMPLES)
    assert uuid.UUID(int=0) not in ids
    # The editor's side gives each opened copy another one.
    known = re.findall(r'"([0-9a-f-]{36})", // (\w+)', (ROOT / "js" / "lib" / "template_ids.mjs").read_text("utf-8"))
    assert {name: uuid.UUID(found) for found, name in known} == {
        path.stem: found for path, found in zip(EXAMPLES, ids, strict=True)
    }


def as_saved(comfy: ComfyClient, name: str) -> dict[str, Any]:
    """An example over the API."""
    path = ROOT / "example_workflows" / f"{name}.json"
    return to_api(json.loads(path.read_text(encoding="utf-8")), comfy.object_info())


def prompt_of(comfy: ComfyClient, name: str) -> dict[str, Any]:
    """An example with few steps, over the API."""
    prompt = as_saved(comfy, name)
    for node in prompt.values():
        node["inputs"].update(FEW.get(node["class_type"], {}))
        if node["class_type"] == "DreamBoothLoRATrain":
            node["inputs"]["output_name"] = f"examples/{name}"
    return prompt


def test_the_first_example_trains_as_the_demo_base_was_measured(comfy: ComfyClient) -> None:
    """What docs/demo-base.md says of the figures then holds for what people open first (with 8 class images to see)."""
    prompt = as_saved(comfy, "train_and_sample")
    options = {**comfy.defaults("DreamBoothOptions"), **OPTIONS}
    (photos,) = (node["inputs"] for node in prompt.values() if node["class_type"] == "LoadSubjectImages")
    assert photos["class_word"] == "" and photos["sample"] == "dog", (
        "the sample's own word, so that none is left behind"
    )
    photos["class_word"] = "dog"
    measured = dreambooth_graph(
        "dog",
        {**SETTINGS, **WAYS[DEFAULT_WAY], "preservation": DEFAULT_WAY, "steps": STEPS, "class_images": 8},
        options,
    )
    shown = {
        "validation_prompts",
        "validation_interval",
        "validation_guidance_scale",
        "validation_steps",
        "output_name",
        "precision",
        "gradient_checkpointing",
    }
    for kind in ("LoadSubjectImages", "DreamBoothLoRATrain", "DreamBoothOptions"):
        (example,) = (node["inputs"] for node in prompt.values() if node["class_type"] == kind)
        (wanted,) = (node["inputs"] for node in measured.values() if node["class_type"] == kind)
        saved = {**comfy.defaults(kind), **example}  # an input that came later has its default
        differ = {name for name, value in wanted.items() if not isinstance(value, list) and saved[name] != value}
        assert differ <= shown, kind
    class_cfg = {node["inputs"]["cfg"] for node in prompt.values() if node["class_type"] == "GenerateClassPriors"}
    cfg = {node["inputs"]["cfg"] for node in prompt.values() if node["class_type"] == "KSampler"}
    assert (class_cfg, cfg) == ({CLASS_CFG}, {CFG})


def lora_of(comfy: ComfyClient, name: str) -> Path:
    assert comfy.server is not None
    return comfy.server.models_dir / "loras" / "examples" / f"{name}.safetensors"


@pytest.mark.parametrize("name", ["train_and_sample", "train_only", "compare_steps"])
def test_example_runs(comfy: ComfyClient, name: str) -> None:
    prompt = prompt_of(comfy, name)
    if name != "train_and_sample":  # one of them studies the base first, which takes longer than all the rest
        (train,) = (node["inputs"] for node in prompt.values() if node["class_type"] == "DreamBoothLoRATrain")
        train["preservation"] = "none"
    result = comfy.run(prompt)
    shown = {prompt[node_id]["class_type"]: output for node_id, output in result.outputs.items()}
    assert lora_of(comfy, name).is_file()
    assert len(shown["DreamBoothLoRATrain"]["images"]) == 2, "a picture at each of two validations"
    saved = len(shown["SaveImage"]["images"]) if "SaveImage" in shown else None
    assert saved == {"train_and_sample": 4, "train_only": None, "compare_steps": 1}[name]


def test_the_example_with_a_trained_lora_runs(comfy: ComfyClient) -> None:
    if not lora_of(comfy, "train_and_sample").is_file():
        comfy.run(prompt_of(comfy, "train_and_sample"))
    prompt = prompt_of(comfy, "use_a_trained_lora")
    (apply,) = (node for node in prompt.values() if node["class_type"] == "ApplySubjectLoRA")
    (train,) = (n for n in prompt_of(comfy, "train_and_sample").values() if n["class_type"] == "DreamBoothLoRATrain")
    assert apply["inputs"]["lora_name"] == "my_dog.safetensors"
    assert "my_dog" in (ROOT / "example_workflows" / "train_and_sample.json").read_text("utf-8")
    assert "subject_lora" not in apply["inputs"] and train["inputs"]["output_name"] == "examples/train_and_sample"
    apply["inputs"]["lora_name"] = str(Path("examples") / "train_and_sample.safetensors")
    assert comfy.run(prompt).images(next(k for k, node in prompt.items() if node["class_type"] == "SaveImage"))


def test_the_example_for_a_checkpoint_of_ones_own_runs_at_the_defaults(comfy: ComfyClient) -> None:
    name = "sd15_train_and_sample"
    saved = as_saved(comfy, name)
    for kind in ("LoadSubjectImages", "GenerateClassPriors", "DreamBoothLoRATrain"):
        (inputs,) = (node["inputs"] for node in saved.values() if node["class_type"] == kind)
        # Inputs that are newer than the workflow have their defaults.
        changed = {name for name, value in comfy.defaults(kind).items() if inputs.get(name, value) != value}
        assert changed <= {"class_word", "output_name", "validation_prompts"}, kind
    prompt = prompt_of(comfy, name)
    for node in prompt.values():
        changes: dict[str, dict[str, Any]] = {
            "CheckpointLoaderSimple": {"ckpt_name": "tiny15.safetensors"},
            "LoadSubjectImages": {"sample": "dog", "resolution": 64},
            "EmptyLatentImage": {"width": 64, "height": 64},
        }
        node["inputs"].update(changes.get(node["class_type"], {}))
    result = comfy.run(prompt)
    assert [len(result.images(k)) for k, node in prompt.items() if node["class_type"] == "SaveImage"] == [4, 4]


@pytest.mark.parametrize(("name", "kind"), [("z_image", "Z-Image"), ("flux2_klein", "Flux.2")])
def test_the_examples_of_todays_families_run_on_small_models(comfy: ComfyClient, name: str, kind: str) -> None:
    """As they are, but for the size; the editor offers the files that they name."""
    saved = json.loads((ROOT / "example_workflows" / f"{name}_train_and_sample.json").read_text("utf-8"))
    files = {
        n["type"]: (n["widgets_values"][0], n["properties"]["models"]) for n in saved["nodes"] if "Loader" in n["type"]
    }
    for chosen, models in files.values():
        (model,) = models
        assert model["name"] == chosen and model["url"].endswith(f"/{model['directory']}/{chosen}")
    prompt = prompt_of(comfy, f"{name}_train_and_sample")
    small = graphs.node("ProbeWiredBase", kind=kind, seed=1, stored="float8_e4m3fn")
    places = {"UNETLoader": 0, "CLIPLoader": 1, "VAELoader": 2}
    loaders = {key: places[n["class_type"]] for key, n in prompt.items() if n["class_type"] in places}
    prompt = {key: n for key, n in prompt.items() if key not in loaders} | {"base": small}
    for n in prompt.values():
        for input_name, value in n["inputs"].items():
            if isinstance(value, list) and value[0] in loaders:
                n["inputs"][input_name] = ["base", loaders[value[0]]]
        n["inputs"].update(
            {"LoadSubjectImages": {"sample": "dog", "class_word": "dog", "resolution": 128}}.get(n["class_type"], {})
        )
        if n["class_type"].startswith("Empty"):
            n["inputs"].update(width=128, height=128)
    result = comfy.run(prompt)
    (save,) = (key for key, n in prompt.items() if n["class_type"] == "SaveImage")
    assert len(result.images(save)) == 1 and lora_of(comfy, f"{name}_train_and_sample").is_file()


def test_the_sdxl_example_is_refused_only_for_its_checkpoint(comfy: ComfyClient) -> None:
    """It cannot be run here at its size; ComfyUI checks all its values before it misses the file.

    What does not need the checkpoint is not run alone: that would be reported as a completed job.
    """
    before = len(comfy.request("GET", "/history"))
    with pytest.raises(PromptRejected) as caught:
        comfy.queue(prompt_of(comfy, "sdxl_train_and_sample"))
    problems = {
        (report["class_type"], problem["extra_info"].get("input_name"))
        for report in caught.value.node_errors.values()
        for problem in report["errors"]
    }
    assert problems == {("CheckpointLoaderSimple", "ckpt_name")}
    assert len(comfy.request("GET", "/history")) == before


def test_photos_whose_trainer_is_rejected_run_with_what_else_needs_them(comfy: ComfyClient) -> None:
    prompt = prompt_of(comfy, "sdxl_train_and_sample")
    (photos,) = (key for key, node in prompt.items() if node["class_type"] == "LoadSubjectImages")
    prompt[photos]["inputs"].update(sample="dog", resolution=64)
    prompt["preview"] = graphs.node("PreviewImage", images=[photos, 1])
    assert set(comfy.run(prompt).outputs) == {photos, "preview"}


@pytest.mark.parametrize("path", EXAMPLES, ids=lambda path: path.stem)
def test_an_example_for_own_photos_names_its_files_and_asks_for_the_class(path: Path) -> None:
    """The editor offers the missing files that `models` describes; a class word left behind would train a wrong one."""
    nodes = json.loads(path.read_text(encoding="utf-8"))["nodes"]
    for node in nodes:
        if node["type"] in ("CheckpointLoaderSimple", "UNETLoader", "CLIPLoader", "VAELoader"):
            (model,) = node["properties"]["models"]
            assert model["name"] == node["widgets_values"][0]
            assert model["url"].startswith("https://") and model["url"].endswith(f"/{model['name']}")
        if node["type"] == "LoadSubjectImages":
            assert node["widgets_values"][3] == ""


@pytest.mark.parametrize("path", EXAMPLES, ids=lambda path: path.stem)
def test_template_browser_serves_it(comfy: ComfyClient, path: Path) -> None:
    listed = comfy.request("GET", "/workflow_templates")
    assert path.stem in listed["SubjectBooth"]
    served = comfy.request("GET", f"/api/workflow_templates/SubjectBooth/{path.name}")
    assert served == json.loads(path.read_text(encoding="utf-8"))
