"""A killed, cancelled or failed training in a real ComfyUI, and two ComfyUIs on one folder: nothing is lost."""

from __future__ import annotations

import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import safetensors.torch
import torch

from subjectbooth.tests.comfy_server import ComfyClient, ComfyServer, Interrupted, NodeFailed
from subjectbooth.tests.fuzzing import is_clean
from subjectbooth.tests.nodes.graphs import Graph, node
from subjectbooth.tests.nodes.training_graphs import apply_node, subject_node, train_node, upload_cat
from subjectbooth.trainer.files.safetensors_file import read_metadata
from subjectbooth.trainer.learn import checkpoint


def _graph(comfy: ComfyClient, options: dict[str, Any] | None = None, **train: Any) -> Graph:
    graph = {
        "1": node("CheckpointLoaderSimple", ckpt_name="tiny15.safetensors"),
        "10": subject_node(upload_cat(comfy)),
        "11": train_node(**train),
    }
    if options is not None:
        graph["13"] = node("DreamBoothOptions", **{**comfy.defaults("DreamBoothOptions"), **options})
        graph["11"]["inputs"]["options"] = ["13", 0]
    return graph


def _run_folder(server: ComfyServer) -> Path:
    """That of the latest run."""
    logs = (server.output_dir / "subjectbooth").glob("*/events.jsonl")
    return max(logs, key=lambda log: log.stat().st_mtime).parent


def _steps(result: Any) -> list[int]:
    return [event.data["value"] for event in result.of_type("progress") if event.data.get("node") == "11"]


def _wait_for_step(comfy: ComfyClient, step: int, since: int) -> None:
    comfy.wait_event(
        lambda event: event.type == "progress" and event.data.get("node") == "11" and event.data["value"] >= step,
        since=since,
        timeout=180,
    )


def _loads(comfy: ComfyClient, path: Path, step: int) -> None:
    """The kept adapter is a LoRA that can be applied, and says its step."""
    assert read_metadata(path)["subjectbooth.step"] == str(step)
    assert read_metadata(path)["ss_steps"] == str(step)
    shutil.copyfile(path, comfy.server.models_dir / "loras" / "kept.safetensors")
    graph = {
        "1": node("CheckpointLoaderSimple", ckpt_name="tiny15.safetensors"),
        "12": apply_node(lora_name="kept.safetensors"),
        "13": node("ProbeValue", value=["12", 2]),
    }
    del graph["12"]["inputs"]["subject_lora"]
    assert comfy.run(graph).outputs["13"]["report"][0]["value"] == "a photo of ohwx cat"


def test_killed_in_the_middle_it_goes_on_and_ends_the_same(comfy_factory: Callable[..., ComfyServer]) -> None:
    with comfy_factory() as server:
        with ComfyClient(server.url, server) as comfy:
            graph = _graph(comfy, {"checkpoint_seconds": 0.0}, steps=30, output_name="killed")
            since = len(comfy.events)
            comfy.queue(graph)
            _wait_for_step(comfy, 6, since)
            server.kill()
        folder = _run_folder(server)
        saved = checkpoint.load(folder / "checkpoint.safetensors").step
        assert saved >= 5  # a checkpoint a step: at most the step that was being saved is lost
        assert not (server.models_dir / "loras" / "killed.safetensors").exists()
        server.restart()
        with ComfyClient(server.url, server) as comfy:
            graph = _graph(comfy, {"checkpoint_seconds": 0.0}, steps=30, output_name="killed")
            assert min(_steps(comfy.run(graph))) == saved
            path = server.models_dir / "loras" / "killed.safetensors"
            first = path.read_bytes()
            graph["11"]["inputs"]["force_retrain"] = True
            assert min(_steps(comfy.run(graph))) == 0
            assert path.read_bytes() == first  # never cut
            assert not [part for part in server.base_dir.rglob(".subjectbooth-*")]


def test_two_comfyuis_on_one_output_folder(
    comfy: ComfyClient, comfy_factory: Callable[..., ComfyServer], tmp_path: Path
) -> None:
    """The second is told, and what the first has finished or kept is found by it."""
    graph = _graph(comfy, steps=400, output_name="shared", learning_rate=0.0071)
    with (
        comfy_factory(
            args=["--fp32-unet", "--fp32-vae", "--fp32-text-enc", "--output-directory", str(comfy.server.output_dir)]
        ) as second,
        ComfyClient(second.url, second) as other,
    ):
        upload_cat(other)
        since = len(comfy.events)
        prompt = comfy.queue(graph)
        _wait_for_step(comfy, 3, since)
        with pytest.raises(NodeFailed, match="one program per run") as failure:
            other.run(graph)
        assert is_clean(failure.value.node_message)
        comfy.interrupt()
        with pytest.raises(Interrupted):
            comfy.wait(prompt, 60)
        step = checkpoint.load(_run_folder(comfy.server) / "checkpoint.safetensors").step
        graph["11"]["inputs"]["steps"] = step + 2
        assert min(_steps(other.run(graph))) == step


@pytest.mark.parametrize("failure", ["cancel", "error", "not finite"])
def test_whatever_ends_a_run_the_adapter_so_far_is_there_and_it_goes_on(comfy: ComfyClient, failure: str) -> None:
    if failure == "not finite":
        wild = {"max_grad_norm": 0.0}
        graph = _graph(comfy, wild, steps=300, learning_rate=1.0, network_alpha=4096.0, output_name="wild")
    else:
        rate = {"cancel": 0.0081, "error": 0.0082}[failure]
        graph = _graph(comfy, {"checkpoint_seconds": 0.0}, steps=300, learning_rate=rate, output_name="ended")
    if failure == "error":
        comfy.run({"1": node("ProbeTraining", nonce=6001, fail_at_step=4)})
    since = len(comfy.events)
    prompt = comfy.queue(graph)
    if failure == "cancel":
        _wait_for_step(comfy, 3, since)
        comfy.interrupt()
        with pytest.raises(Interrupted):
            comfy.wait(prompt, 60)
    else:
        with pytest.raises(NodeFailed) as failed:
            comfy.wait(prompt, 300)
        if failure == "not finite":
            assert "Required: finite numbers" in failed.value.node_message
            assert is_clean(failed.value.node_message)
    folder = _run_folder(comfy.server)
    step = checkpoint.load(folder / "checkpoint.safetensors").step
    assert step >= 1
    path = folder / f"lora_{step:06d}.safetensors"
    if failure == "error":  # in the middle of the optimizer's step, so that what is in memory is of no step at all
        assert step == 3
        assert not path.exists()
    else:
        tensors = safetensors.torch.load_file(path)
        assert all(bool(torch.isfinite(tensor).all()) for tensor in tensors.values())
        _loads(comfy, path, step)
    if failure != "not finite":  # that one would end there again
        graph["11"]["inputs"]["steps"] = step + 2
        assert min(_steps(comfy.run(graph))) == step


def test_a_run_that_cannot_be_written_is_a_sentence(comfy: ComfyClient) -> None:
    """A file lies where the runs' folder would be: the error of a read-only or missing disk, which root has too."""
    base = comfy.server.output_dir / "subjectbooth"
    aside = base.with_name("aside")
    if base.exists():
        base.rename(aside)
    base.write_bytes(b"")
    try:
        with pytest.raises(NodeFailed) as failure:
            comfy.run(_graph(comfy, steps=1, learning_rate=0.0091, output_name="unwritable"))
    finally:
        base.unlink()
        if aside.exists():
            aside.rename(base)
    assert is_clean(failure.value.node_message)
    assert "Required: free disk space and write permission" in failure.value.node_message
