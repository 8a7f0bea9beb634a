"""Class images on their way into training: made, trained with, left out, all in one real graph."""

from __future__ import annotations

import json
from typing import Any

import pytest
import safetensors.torch
import torch

from subjectbooth.tests.comfy_server import ComfyClient, NodeFailed, RunResult
from subjectbooth.tests.nodes.graphs import Graph, node, text_to_image
from subjectbooth.tests.nodes.test_harness import pixels
from subjectbooth.tests.nodes.test_priors_node import SIZE, priors_graph, sampler_steps
from subjectbooth.tests.nodes.training_graphs import train_node
from subjectbooth.trainer.files.safetensors_file import read_metadata


def trained(comfy: ComfyClient, *, train: dict[str, Any] | None = None, **priors: Any) -> RunResult:
    graph: Graph = priors_graph(comfy, **{"seed": 2100, "count": 3, **priors})
    graph["11"] = train_node(class_priors=["20", 0], output_name="with_priors", **(train or {}))
    return comfy.run(graph)


def run_of(result: RunResult) -> str:
    """The folder of the run that the trainer's node did or found again."""
    return str(result.outputs["11"]["subjectbooth"][0]["run"])


def says(result: RunResult) -> str:
    """``trained`` or ``reused (trained before)``."""
    return str(result.outputs["11"]["text"][0]).split(":")[0]


def steps_of(comfy: ComfyClient, run: str) -> list[dict[str, Any]]:
    """The steps in one run's log. Other tests leave other runs in the output folder, damaged ones too."""
    log = comfy.server.output_dir / "subjectbooth" / run / "events.jsonl"
    lines = [json.loads(line) for line in log.read_text("utf-8").splitlines()]
    return [line for line in lines if line["event"] == "StepDone"]


def test_class_images_train_and_changed_ones_train_anew(comfy: ComfyClient) -> None:
    first = trained(comfy)
    assert says(first) == "trained"
    steps = steps_of(comfy, run_of(first))
    assert len(steps) == 3
    for step in steps:
        assert step["prior_loss"] > 0
        assert abs(step["loss"] - (step["instance_loss"] + step["prior_loss"])) < 1e-4 * step["loss"]
    # ComfyUI forgets; neither the class images nor the training are done again.
    comfy.free()
    again = trained(comfy)
    assert sampler_steps(again) == 0
    assert says(again).startswith("reused") and run_of(again) == run_of(first)
    assert len(steps_of(comfy, run_of(first))) == 3
    hashes = again.outputs["20"]["hashes"]
    # The same pictures, one left out: nothing is sampled, and the LoRA is another one.
    without = trained(comfy, exclude=hashes[1])
    assert sampler_steps(without) == 0
    assert says(without) == "trained" and run_of(without) != run_of(first)
    assert len(steps_of(comfy, run_of(without))) == 3


def test_the_way_to_keep_the_class_is_chosen_at_the_trainer(comfy: ComfyClient) -> None:
    """The teacher trains with and without class images; class_images needs them."""
    with_images = trained(comfy, train={"preservation": "teacher", "train_batch_size": 2})
    graph = priors_graph(comfy)
    for other in ("20", "21", "22"):
        del graph[other]
    graph["11"] = train_node(output_name="with_priors", preservation="teacher", train_batch_size=2)
    without = comfy.run(graph)
    assert run_of(without) != run_of(with_images)
    for result in (with_images, without):
        steps = steps_of(comfy, run_of(result))
        assert [step["step"] for step in steps] == [1, 2, 3] and steps[-1]["teacher_loss"] > 0
        file = comfy.server.models_dir / "loras" / result.outputs["11"]["subjectbooth"][0]["lora"]
        assert read_metadata(file)["subjectbooth.preservation"] == "teacher"
    graph["11"]["inputs"]["preservation"] = "class_images"
    with pytest.raises(NodeFailed) as failure:
        comfy.run(graph)
    wanted = "Connect Generate Class Priors to class_priors, or set preservation to curvature, which needs none."
    assert failure.value.node_id == "11" and wanted in failure.value.node_message


def test_a_picture_made_under_other_settings_trains_anew(comfy: ComfyClient) -> None:
    first = trained(comfy, seed=2200)
    other = trained(comfy, seed=2201)
    assert says(first) == says(other) == "trained" and run_of(first) != run_of(other)


def test_the_latents_are_not_touched_by_training(comfy: ComfyClient) -> None:
    first = trained(comfy, seed=2300)
    graph = priors_graph(comfy, seed=2300, count=3, exclude="0" * 64)
    graph["30"] = node("ProbeState", after=["20", 0])
    assert comfy.run(graph).outputs["21"]["report"][0] == first.outputs["21"]["report"][0]


@pytest.mark.parametrize(
    ("train", "options", "sentence"),
    [
        (
            {},
            {"masked_loss": True},
            "masked_loss without a mask. Required: a mask for the photos. Use photos with transparency, or turn "
            "masked_loss off. Or connect photos and their MASK to Load Subject Images.",
        ),
        ({"rank": 400}, {}, "rank 400. Required: 320 or less"),
        (
            {"validation_prompts": "embedding:nothing {subject}"},
            {"train_text_encoder": True},
            "contains an embedding:",
        ),
        ({"output_name": "blocked/cat"}, {}, "The LoRA cannot be written"),
        ({"preservation": "teachers"}, {}, "preservation 'teachers'. Required: one of curvature, class_images"),
    ],
)
def test_what_the_trainer_refuses_is_refused_before_class_images_are_made(
    comfy: ComfyClient, train: dict[str, Any], options: dict[str, Any], sentence: str
) -> None:
    (comfy.server.models_dir / "loras" / "blocked").write_bytes(b"")
    embedding = comfy.server.models_dir / "embeddings" / "nothing.safetensors"
    embedding.parent.mkdir(exist_ok=True)
    safetensors.torch.save_file({"emb_params": torch.zeros(1, 768)}, embedding)
    graph = priors_graph(comfy, seed=2400, count=1)
    graph["9"] = node("DreamBoothOptions", **{**comfy.defaults("DreamBoothOptions"), **options})
    graph["11"] = train_node(class_priors=["20", 0], **{"options": ["9", 0], **train})
    before = set(comfy.server.output_dir.rglob("*"))
    with pytest.raises(NodeFailed) as failure:
        comfy.run(graph)
    assert failure.value.node_id == "20" and sentence in failure.value.node_message
    assert set(comfy.server.output_dir.rglob("*")) == before


def test_a_trainer_whose_settings_are_not_known_yet_is_left_to_itself(comfy: ComfyClient) -> None:
    graph = priors_graph(comfy, seed=2400, count=1, steps=1)
    graph["12"] = node("PrimitiveInt", value=400)
    graph["11"] = train_node(class_priors=["20", 0], rank=["12", 0])
    with pytest.raises(NodeFailed) as failure:
        comfy.run(graph)
    assert failure.value.node_id == "11"


def test_class_images_of_another_model_are_reported_by_the_trainer(comfy: ComfyClient) -> None:
    graph = priors_graph(comfy, seed=2500, count=1)
    graph["9"] = node(
        "LoraLoader",
        model=["1", 0],
        clip=["1", 1],
        lora_name="tiny_style.safetensors",
        strength_model=0.8,
        strength_clip=0.8,
    )
    graph["20"]["inputs"]["model"] = ["9", 0]
    graph["11"] = train_node(class_priors=["20", 0], output_name="other_priors", steps=1)
    told = "\n".join(comfy.run(graph).outputs["11"]["text"])
    assert "The class images were made by another model" in told
    assert "Connect the same MODEL and CLIP to Generate Class Priors and to the trainer." in told
    graph["20"]["inputs"]["model"] = ["1", 0]
    assert "another model" not in "\n".join(comfy.run(graph).outputs["11"]["text"])


def test_class_images_are_shown_before_and_after_from_the_same_seeds(comfy: ComfyClient) -> None:
    """The trainer's pictures are those of Generate Class Priors and of KSampler with the LoRA; drawn once only."""
    hashes = trained(comfy).outputs["20"]["hashes"]
    settings = {"preservation": "none", "steps": 4, "learning_rate": 5e-3}
    result = trained(comfy, train=settings, exclude=hashes[0])
    shown = result.outputs["11"]["subjectbooth"][0]["class"]
    assert shown["prompt"] == "a photo of a cat" and shown["drift"] is None  # nothing here embeds pictures
    before, after = (pixels(comfy, shown[side]) for side in ("before", "after"))
    assert before.shape == after.shape == (SIZE, 2 * SIZE + 2, 3)
    kept = [pixels(comfy, picture) for picture in result.images("20")]
    assert abs(before[:, :SIZE] - kept[0]).max() <= 1 and abs(before[:, -SIZE:] - kept[1]).max() <= 1
    lora = result.outputs["11"]["subjectbooth"][0]["lora"]
    graph = text_to_image(prompt="a photo of a cat", seed=2101, cfg=2.0, model=["8", 0], clip=["8", 1])
    strengths = {"strength_model": 1.0, "strength_clip": 1.0}
    graph["8"] = node("LoraLoader", model=["1", 0], clip=["1", 1], lora_name=lora, **strengths)
    expected = pixels(comfy, comfy.run(graph, targets=("7",)).images("7")[0])
    assert abs(after[:, :SIZE] - expected).max() <= 1
    assert abs(after - before).mean() > 1

    comfy.free()
    again = trained(comfy, train={**settings, "force_retrain": True}, exclude=hashes[0])
    assert again.outputs["11"]["subjectbooth"][0]["class"] == shown  # with the files' times
