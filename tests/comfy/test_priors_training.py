"""Class images on their way into training: made, trained with, left out, all in one real graph."""

from __future__ import annotations

import json
from typing import Any

from subjectbooth.scripts.comfy_server import ComfyClient, RunResult
from subjectbooth.tests.comfy.graphs import Graph, node
from subjectbooth.tests.comfy.test_priors_node import priors_graph, sampler_steps
from subjectbooth.tests.comfy.training_graphs import train_node


def trained(comfy: ComfyClient, *, train: dict[str, Any] | None = None, **priors: Any) -> RunResult:
    graph: Graph = priors_graph(comfy, **{"seed": 2100, "count": 3, **priors})
    graph["11"] = train_node(class_priors=["20", 0], output_name="with_priors", **(train or {}))
    return comfy.run(graph)


def trained_steps(result: RunResult) -> int:
    return sum(1 for e in result.of_type("progress") if e.data["node"] == "11")


def run_events(comfy: ComfyClient) -> list[list[dict[str, Any]]]:
    """The steps of every run in the output folder; other tests leave damaged logs there."""
    runs = []
    for path in (comfy.server.output_dir / "subjectbooth").rglob("events.jsonl"):
        lines = [json.loads(line) for line in path.read_text("utf-8").splitlines() if line.startswith("{")]
        runs.append([line for line in lines if line["event"] == "StepDone"])
    return runs


def test_class_images_train_and_changed_ones_train_anew(comfy: ComfyClient) -> None:
    before = len(run_events(comfy))
    first = trained(comfy)
    assert trained_steps(first) > 0
    runs = [steps for steps in run_events(comfy) if steps and steps[0]["prior_loss"] is not None]
    assert len(run_events(comfy)) == before + 1 and runs
    for step in runs[-1]:
        assert step["prior_loss"] > 0
        assert abs(step["loss"] - (step["instance_loss"] + step["prior_loss"])) < 1e-4 * step["loss"]
    # ComfyUI forgets; neither the class images nor the training are done again.
    comfy.free()
    again = trained(comfy)
    assert sampler_steps(again) == 0 and len(run_events(comfy)) == before + 1
    hashes = again.outputs["20"]["hashes"]
    # The same pictures, one left out: nothing is sampled, and the LoRA is another one.
    trained(comfy, exclude=hashes[1])
    assert len(run_events(comfy)) == before + 2


def test_a_picture_made_under_other_settings_trains_anew(comfy: ComfyClient) -> None:
    trained(comfy, seed=2200)
    before = len(run_events(comfy))
    trained(comfy, seed=2201)
    assert len(run_events(comfy)) == before + 1


def test_the_latents_are_not_touched_by_training(comfy: ComfyClient) -> None:
    first = trained(comfy, seed=2300)
    graph = priors_graph(comfy, seed=2300, count=3, exclude="0" * 64)
    graph["30"] = node("ProbeState", after=["20", 0])
    assert comfy.run(graph).outputs["21"]["report"][0] == first.outputs["21"]["report"][0]
