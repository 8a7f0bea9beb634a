"""Cancel is noticed at once, however rarely ComfyUI's own progress bar asks for it.

The cancel is pressed inside the server right after the `at`-th photo or step (ProbeCancel), and how many still came is
counted: no clock decides. ComfyUI itself asks within its own models, so class images and encoding stop there.
"""

from __future__ import annotations

from typing import Any

import pytest

from subjectbooth.tests.comfy_server import ComfyClient, Event, Interrupted
from subjectbooth.tests.nodes.graphs import Graph, node
from subjectbooth.tests.nodes.training_graphs import subject_node, train_node, upload_cat
from subjectbooth.trainer.learn import checkpoint

SHOWN_AT = 3
"""The step with validation pictures."""


def run_and_cancel(comfy: ComfyClient, graph: Graph, kind: str, at: int) -> tuple[int, list[Event]]:
    """Cancel it after the `at`-th of this kind; how many there were in the end, and ComfyUI's messages."""
    comfy.run({"1": node("ProbeCancel", kind=kind, at=at)})
    since = len(comfy.events)
    try:
        prompt = comfy.queue(graph)
        with pytest.raises(Interrupted):
            comfy.wait(prompt, 300)
    finally:
        report = comfy.run({"1": node("ProbeCancel", kind="", at=0)}).outputs["1"]["report"][0]
    return report["count"], comfy.events[since:]


def _bar(events: list[Event]) -> list[int]:
    return [event.data["value"] for event in events if event.type == "progress" and event.data["node"] == "11"]


@pytest.mark.parametrize(("kind", "at"), [("StepDone", 9), ("ValidationStep", 5)])
def test_a_training_stops_within_one_step(comfy: ComfyClient, kind: str, at: int) -> None:
    drawn: dict[str, Any] = {"validation_prompts": "a photo of {subject}", "validation_interval": SHOWN_AT}
    graph = {
        "1": node("CheckpointLoaderSimple", ckpt_name="tiny15.safetensors"),
        "10": subject_node(upload_cat(comfy)),
        "11": train_node(
            steps=5000,
            learning_rate=0.006 + at / 1e5,
            output_name="cancelled",
            **(drawn if kind == "ValidationStep" else {}),
        ),
    }
    count, events = run_and_cancel(comfy, graph, kind, at)
    assert count == at
    messages = [event.data for event in events if event.type == "subjectbooth.train"]
    step = at if kind == "StepDone" else SHOWN_AT
    assert (messages[-1]["state"], messages[-1]["step"]) == ("cancelled", step)
    folder = comfy.server.output_dir / "subjectbooth" / messages[-1]["run"]
    assert checkpoint.load(folder / "checkpoint.safetensors").step == step
    assert (folder / f"lora_{step:06d}.safetensors").is_file()
    if kind == "StepDone":
        assert _bar(events) == list(range(at)), "a step is a fiftieth of a percent, and the bar moves all the same"
        graph["11"]["inputs"]["steps"] = step + 2
        again = comfy.run(graph).events
        shown = [event.data for event in again if event.type == "subjectbooth.train"]
        assert (shown[0]["state"], shown[0]["step"]) == ("preparing", step)
        assert _bar(again) == [step, step + 1, step + 2], "the run goes on where it was cancelled"


def test_reading_photos_stops_at_the_next_one(comfy: ComfyClient) -> None:
    graph = {"10": subject_node(upload_cat(comfy), token="hta")}
    assert run_and_cancel(comfy, graph, "photo", 2)[0] == 2
