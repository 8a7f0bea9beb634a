"""EvaluateSubjectLoRA in a real ComfyUI: KSampler's own pictures with and without a LoRA, compared and kept."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import safetensors.torch
import torch

from subjectbooth.tests.comfy_server import ComfyClient, Interrupted, NodeFailed, PromptRejected, RunResult
from subjectbooth.tests.fuzzing import is_clean
from subjectbooth.tests.nodes.fuzz_values import refusals_of
from subjectbooth.tests.nodes.graphs import Graph, node, text_to_image
from subjectbooth.tests.nodes.test_apply import BOTH, NEITHER
from subjectbooth.tests.nodes.test_harness import pixels
from subjectbooth.tests.nodes.training_graphs import subject_node, train_node, upload_cat

STYLE = "tiny_style.safetensors"
PROMPTS = "a photo of a clock\n\na photo of {subject} in the rain"
DRAWN = [
    "a photo of a cat",
    "a photo of a cat in the rain",
    "a photo of a clock",
    "a photo of ohwx cat",
    "a photo of ohwx cat in the rain",
]
SEEDS = 2


def evaluate_graph(comfy: ComfyClient, *, compared: bool = True, **inputs: Any) -> Graph:
    """ "1" checkpoint, "10" subject, "30" EvaluateSubjectLoRA, "31" CLIP_VISION, "32" to "34" its pictures."""
    given = {
        "model": ["1", 0],
        "clip": ["1", 1],
        "vae": ["1", 2],
        "subject": ["10", 0],
        "lora_name": STYLE,
        "strength": 1.0,
        "prompts": PROMPTS,
        "seeds": SEEDS,
        "steps": 2,
        "cfg": 1.0,
        "sampler_name": "euler",
        "scheduler": "normal",
        "seed": 2000,
        "resolution": 0,
        **({"clip_vision": ["31", 0]} if compared else {}),
        **inputs,
    }
    outputs = {"32": ("grid", 0), "33": ("before", 3), "34": ("after", 4)}
    return {
        "1": node("CheckpointLoaderSimple", ckpt_name="tiny15.safetensors"),
        "10": subject_node(upload_cat(comfy)),
        "30": node("EvaluateSubjectLoRA", **given),
        "31": node("ProbeClipVision", broken=False),
        **{
            key: node("SaveImage", images=["30", slot], filename_prefix=f"evaluate_{name}")
            for key, (name, slot) in outputs.items()
        },
        "35": node("ProbeValue", value=["30", 2]),
        "36": node("ProbeValue", value=["30", 1]),
    }


def figures_of(result: RunResult) -> dict[str, Any]:
    return json.loads(result.outputs["35"]["report"][0]["value"])


def values_of(result: RunResult) -> dict[str, float]:
    return {name: figure["value"] for name, figure in figures_of(result)["figures"].items()}


def pictures_of(comfy: ComfyClient, result: RunResult, key: str) -> list[np.ndarray]:
    return [pixels(comfy, record) for record in result.images(key)]


@pytest.fixture(scope="module")
def cancelled_and_finished(_comfy_client: ComfyClient) -> tuple[int, RunResult]:
    """How far an evaluation came that was cancelled at the first step of the second prompt; and the finished one."""
    comfy, graph = _comfy_client, evaluate_graph(_comfy_client)
    comfy.run({"1": node("ProbeCancel", kind="bar", at=2 + 1)})
    try:
        prompt = comfy.queue(graph)
        with pytest.raises(Interrupted):
            comfy.wait(prompt, 300)
    finally:
        report = comfy.run({"1": node("ProbeCancel", kind="", at=0)}).outputs["1"]["report"][0]
    return report["count"], comfy.run(graph)


def test_cancelled_it_stops_within_a_step_and_goes_on_where_it_was(
    cancelled_and_finished: tuple[int, RunResult],
) -> None:
    steps, result = cancelled_and_finished
    assert steps == 2 + 1
    assert result.outputs["30"]["made"] == [2 * SEEDS * len(DRAWN) - SEEDS]
    texts = [event.data["text"] for event in result.of_type("progress_text")]
    assert any("of 18 pictures, " in text and '\nwith the LoRA: "a photo of' in text for text in texts), texts


def test_the_pictures_are_ksamplers_and_what_is_reported_is_on_the_disk(
    comfy: ComfyClient, cancelled_and_finished: tuple[int, RunResult]
) -> None:
    result = cancelled_and_finished[1]
    found = figures_of(result)
    assert [prompt for group in found["prompts"].values() for prompt in group] == DRAWN
    assert found["seeds"] == [2000, 2001] and found["embedder"] == "CLIP"
    before, after = (pictures_of(comfy, result, key) for key in ("33", "34"))
    for prompt, seed, with_lora in (
        ("a photo of a clock", 2001, False),
        ("a photo of ohwx cat in the rain", 2000, True),
    ):
        index = DRAWN.index(prompt) * SEEDS + seed - 2000
        links = {"model": ["8", 0], "clip": ["8", 1]} if with_lora else {}
        graph = text_to_image(prompt=prompt, seed=seed, cfg=1.0, **links)
        strengths = {"strength_model": 1.0, "strength_clip": 1.0}
        graph["8"] = node("LoraLoader", model=["1", 0], clip=["1", 1], lora_name=STYLE, **strengths)
        expected = pixels(comfy, comfy.run(graph, targets=("7",)).images("7")[0])
        # A batch of two adds up in another order than one alone.
        assert abs((after if with_lora else before)[index].astype(int) - expected).max() <= 1
        assert abs(before[index].astype(int) - after[index]).mean() > 1
    (shown,) = result.images("30")
    folder = comfy.server.output_dir / shown["subfolder"]
    assert folder.parent.name == "evaluations" and folder.name.startswith("tiny_style_")
    assert json.loads((folder / "figures.json").read_text("utf-8")) == found
    assert result.outputs["36"]["report"][0]["value"].strip() in (folder / "report.md").read_text("utf-8")
    assert (folder / "figures.csv").read_text("utf-8").count("\n") == 1 + len(found["figures"])
    assert np.array_equal(pixels(comfy, shown), pictures_of(comfy, result, "32")[0])
    lines = result.outputs["30"]["text"]
    assert lines[0].startswith(f"drift_class {values_of(result)['drift_class']:.2f} ")
    assert values_of(result)["drift_others"] > 0


def test_nothing_is_drawn_twice_and_a_lora_without_effect_has_no_drift(
    comfy: ComfyClient, cancelled_and_finished: tuple[int, RunResult]
) -> None:
    """The LoRA of zeros is applied and drawn with, so that its pictures are new ones from the same seeds."""
    folder, half = comfy.server.models_dir / "loras", SEEDS * len(DRAWN)
    zeros = {
        name: torch.zeros_like(tensor) if "lora_up" in name else tensor
        for name, tensor in safetensors.torch.load_file(folder / STYLE).items()
        if name.startswith("lora_unet_")
    }
    safetensors.torch.save_file(zeros, folder / "no effect.safetensors")
    result = comfy.run(evaluate_graph(comfy, lora_name="no effect.safetensors"))
    assert result.outputs["30"]["made"] == [half]
    values = values_of(result)
    assert (values["drift_class"], values["drift_others"]) == (0, 0)
    before, after = (pictures_of(comfy, result, key) for key in ("33", "34"))
    assert all(np.array_equal(*pair) for pair in zip(before, after, strict=True))
    assert values["pres"] == values["pres_before"]
    # At strength 0 the model is the base, whose pictures are there. And without an embedding, there are no figures.
    off = comfy.run(evaluate_graph(comfy, strength=0.0))
    assert off.outputs["30"]["made"] == [0] and values_of(off) == values
    plain = comfy.run(evaluate_graph(comfy, compared=False))
    assert plain.outputs["30"]["made"] == [0] and figures_of(plain)["figures"] == {}
    for shown in (plain.outputs["30"]["text"][0], plain.outputs["36"]["report"][0]["value"]):
        assert "connect a CLIP or DINOv2 model from Load CLIP Vision to clip_vision" in shown
    assert len(pictures_of(comfy, plain, "34")) == half and pictures_of(comfy, plain, "32")[0].std() > 10


REFUSED: list[tuple[dict[str, Any], str]] = [
    ({"prompts": "a {class} at night"}, "prompts has a placeholder other than {subject} in 'a {class} at night'."),
    ({"prompts": "a {subject"}, "prompts has a placeholder other than {subject} in 'a {subject'."),
    ({"lora_name": "(from subject_lora)"}, NEITHER),
    ({"subject_lora": ["40", 0]}, BOTH),
    ({"lora_name": "never made.safetensors"}, "lora_name 'never made.safetensors' was not found."),
]


@pytest.mark.parametrize(("inputs", "said"), REFUSED, ids=[str(number) for number in range(len(REFUSED))])
def test_a_wrong_choice_is_refused_before_anything_runs(comfy: ComfyClient, inputs: dict[str, Any], said: str) -> None:
    graph = evaluate_graph(comfy, seed=2_431, **inputs)
    graph["40"] = train_node(output_name="never trained")
    with pytest.raises(PromptRejected) as failure:
        comfy.queue(graph, targets=("30",))
    assert any(said in sentence for sentence in refusals_of(failure.value)), failure.value


def test_what_cannot_be_evaluated_is_refused_before_a_picture(comfy: ComfyClient) -> None:
    other = {f"transformer.blocks.0.attn.to_q.lora_{part}.weight": torch.ones(4, 4) for part in "AB"}
    safetensors.torch.save_file(other, comfy.server.models_dir / "loras" / "other family.safetensors")
    cases: list[tuple[dict[str, Any], str]] = [
        ({"lora_name": "other family.safetensors"}, "None of the LoRA's 1 layers fit this model. Required: a LoRA for"),
        ({"clip_vision": ["41", 0]}, "The model at clip_vision does not give one finite vector for each picture."),
        (
            {"model": ["42", 0]},
            "The MODEL already has the LoRA tiny_style.safetensors. Required: the MODEL without it.",
        ),
        ({"strength": float("nan")}, "strength nan. Required: a number"),
        ({"resolution": 32}, "resolution 32. Required: 64 to 4096 pixels"),
    ]
    for inputs, said in cases:
        graph = evaluate_graph(comfy, seed=2_431, **inputs)
        graph["41"] = node("ProbeClipVision", broken=True)
        graph["42"] = node("LoraLoaderModelOnly", model=["1", 0], lora_name=STYLE, strength_model=0.5)
        with pytest.raises(NodeFailed) as failure:
            comfy.run(graph, targets=("30",))
        assert said in failure.value.node_message and is_clean(failure.value.node_message), inputs
    root: Path = comfy.server.output_dir / "subjectbooth" / "class_images"
    recipes = [json.loads(path.read_text("utf-8")) for path in root.glob("*/recipe.json")]
    assert recipes and not [recipe for recipe in recipes if recipe["seed"] == 2_431]
