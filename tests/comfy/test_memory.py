"""The hand-over of memory: ComfyUI's models are out of the way in training, and the trainer's are gone after it."""

from __future__ import annotations

from typing import Any

import pytest

from subjectbooth.scripts.comfy_server import ComfyClient, Interrupted, NodeFailed
from subjectbooth.tests.comfy.graphs import node
from subjectbooth.tests.comfy.training_graphs import train_and_sample, upload_cat


def _state(client: ComfyClient, nonce: int) -> dict[str, Any]:
    """With the checkpoint in the graph, so that ComfyUI's own model is alive and counted both times."""
    graph = {"1": node("CheckpointLoaderSimple", ckpt_name="tiny15.safetensors"),
             "2": node("ProbeState", after=["1", 0], nonce=nonce)}
    return client.run(graph).outputs["2"]["report"][0]


def _watch(client: ComfyClient, nonce: int, fail_at_step: int = 0) -> list[int]:
    """What was loaded at each optimizer step since the last call; arms the next failure."""
    graph = {"1": node("ProbeTraining", nonce=nonce, fail_at_step=fail_at_step)}
    return client.run(graph).outputs["1"]["report"][0]["loaded_at_each_step"]


def test_nothing_is_loaded_while_training_and_nothing_is_left_after_ten_runs(comfy: ComfyClient) -> None:
    images = upload_cat(comfy)

    def graph(seed: int, steps: int = 3) -> dict[str, Any]:
        # The learning rate differs, so that every run is a run of its own.
        return train_and_sample(images, seed=seed, steps=steps, learning_rate=1e-4 * (seed - 4000),
                                output_name="memory", validation_prompts="a photo of {subject}")

    for number in range(1, 4):  # what is loaded once and for good (libraries, caches) is loaded now
        comfy.run(graph(4000 + number))
    _watch(comfy, 1)
    before = _state(comfy, 1)
    assert before["parameters"] > 100_000_000  # the probe sees ComfyUI's own model
    for number in range(4, 14):
        seed = 4000 + number
        if number % 5 == 3:
            since = len(comfy.events)
            prompt_id = comfy.queue(graph(seed, steps=500))
            comfy.wait_event(lambda event: event.type == "progress" and event.data.get("node") == "11"
                             and 3 <= event.data["value"] < 500, since=since, timeout=120)
            comfy.interrupt()
            with pytest.raises(Interrupted):
                comfy.wait(prompt_id, 60)
        elif number % 5 == 4:
            _watch(comfy, 100 + number, fail_at_step=2)
            with pytest.raises(NodeFailed, match="made to fail"):
                comfy.run(graph(seed))
        else:
            comfy.run(graph(seed))
        at_steps = _watch(comfy, 200 + number)
        assert at_steps, number
        assert at_steps[0] == 0, f"run {number}: {at_steps[0]} models were loaded at the first step"
    after = _state(comfy, 2)
    print(f"parameters {before['parameters']:,} -> {after['parameters']:,}, memory {before['rss_mb']:.0f} -> "
          f"{after['rss_mb']:.0f} MB over ten runs")
    assert after["parameters"] == before["parameters"]
    assert after["trainable_parameters"] == before["trainable_parameters"]
    assert after["rss_mb"] - before["rss_mb"] < 120, "one leaked copy of the tiny UNet alone is 100 MB"
