"""The hand-over of memory: ComfyUI's models are out of the way in training, and the trainer's are gone after it.

SUBJECTBOOTH_RUNS sets how many train-and-sample runs are made (`make soak`: 50).
"""

from __future__ import annotations

import os
from typing import Any

import pytest

from subjectbooth.tests.comfy_server import ComfyClient, Interrupted, NodeFailed
from subjectbooth.tests.fuzzing import report
from subjectbooth.tests.nodes.graphs import node
from subjectbooth.tests.nodes.training_graphs import subject_node, train_and_sample, train_node, upload_cat

RUNS = int(os.environ.get("SUBJECTBOOTH_RUNS", "6"))


def _state(client: ComfyClient, nonce: int) -> dict[str, Any]:
    """With the checkpoint in the graph, so that ComfyUI's own model is alive and counted both times."""
    graph = {
        "1": node("CheckpointLoaderSimple", ckpt_name="tiny15.safetensors"),
        "2": node("ProbeState", after=["1", 0], nonce=nonce),
    }
    return client.run(graph).outputs["2"]["report"][0]


def _watch(client: ComfyClient, nonce: int, fail_at_step: int = 0) -> list[int]:
    """What was loaded at each optimizer step since the last call; arms the next failure."""
    graph = {"1": node("ProbeTraining", nonce=nonce, fail_at_step=fail_at_step)}
    return client.run(graph).outputs["1"]["report"][0]["loaded_at_each_step"]


def test_only_the_base_is_loaded_while_training_and_nothing_is_left_after_many_runs(comfy: ComfyClient) -> None:
    images = upload_cat(comfy)

    def graph(seed: int, steps: int = 3) -> dict[str, Any]:
        # The learning rate differs, so that every run is a run of its own.
        return train_and_sample(
            images,
            seed=seed,
            steps=steps,
            learning_rate=1e-4 * (seed - 4000),
            output_name="memory",
            validation_prompts="a photo of {subject}",
        )

    for number in range(1, 4):  # what is loaded once and for good (libraries, caches) is loaded now
        comfy.run(graph(4000 + number))
    _watch(comfy, 1)
    before = _state(comfy, 1)
    assert before["parameters"] > 100_000_000  # the probe sees ComfyUI's own model
    outcomes = {"finished": 0, "cancelled": 0, "failed": 0}
    for number in range(4, 4 + RUNS):
        seed = 4000 + number
        outcomes["cancelled" if number % 5 == 3 else "failed" if number % 5 == 4 else "finished"] += 1
        if number % 5 == 3:
            since = len(comfy.events)
            prompt_id = comfy.queue(graph(seed, steps=500))
            comfy.wait_event(
                lambda event: (
                    event.type == "progress" and event.data.get("node") == "11" and 3 <= event.data["value"] < 500
                ),
                since=since,
                timeout=120,
            )
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
        assert at_steps[0] == 1, f"run {number}: {at_steps[0]} models were loaded at the first step"
    after = _state(comfy, 2)
    report(
        f"{RUNS} runs that train and sample, in one ComfyUI",
        outcomes=outcomes,
        said=(
            f"{outcomes['finished']} finished, {outcomes['cancelled']} cancelled, {outcomes['failed']} failed; "
            f"parameters {before['parameters']:,} -> {after['parameters']:,}, "
            f"tensors {before['tensors']} -> {after['tensors']}, "
            f"memory {before['rss_mb']:.0f} -> {after['rss_mb']:.0f} MB, "
            f"threads {len(before['threads'])} -> {len(after['threads'])}, file handles "
            f"{before['handles']} -> {after['handles']}; settings unchanged"
        ),
    )
    assert after["parameters"] == before["parameters"]
    assert after["trainable_parameters"] == before["trainable_parameters"]
    # ComfyUI keeps what each node gave last, so a few tensors come and go with the graph; a run's own are hundreds.
    assert after["tensors"] - before["tensors"] < 100
    assert after["rss_mb"] - before["rss_mb"] < 120, "one leaked copy of the tiny UNet alone is 100 MB"
    assert after["settings"] == before["settings"]
    assert len(after["threads"]) <= len(before["threads"])
    assert after["handles"] <= before["handles"] + 5  # the web server's own connections come and go
    assert not [path for path in after["open_files"] if "subjectbooth" in path or path.endswith(".safetensors")]


def test_training_leaves_the_process_as_it_was(comfy: ComfyClient) -> None:
    """The random states too, which ComfyUI's own sampler sets anew: nothing is sampled here."""
    images = upload_cat(comfy)

    def graph(nonce: int) -> dict[str, Any]:
        return {
            "1": node("CheckpointLoaderSimple", ckpt_name="tiny15.safetensors"),
            "10": subject_node(images),
            "2": node("ProbeState", after=["1", 0], nonce=nonce),
        }

    comfy.run({**graph(0), "11": train_node(steps=2, learning_rate=0.0021)})  # loads what is loaded once and for good
    before = comfy.run(graph(1)).outputs["2"]["report"][0]
    trained = {"11": train_node(steps=2, learning_rate=0.0022, validation_prompts="{subject}")}
    comfy.run({**graph(0), **trained})
    after = comfy.run(graph(2)).outputs["2"]["report"][0]
    assert after["random_states"] == before["random_states"]
    assert after["settings"] == before["settings"]
    assert after["threads"] == before["threads"]
