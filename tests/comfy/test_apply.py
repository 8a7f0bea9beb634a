"""ApplySubjectLoRA with files of other programs, and what it refuses before anything runs."""

from __future__ import annotations

import numpy as np
import pytest
import safetensors.torch
import torch

from subjectbooth.scripts.comfy_server import ComfyClient, NodeFailed, PromptRejected
from subjectbooth.tests import tiny
from subjectbooth.tests.comfy.fuzz_values import refusals_of
from subjectbooth.tests.comfy.graphs import Graph, node, text_to_image
from subjectbooth.tests.comfy.test_harness import pixels
from subjectbooth.tests.comfy.training_graphs import apply_node, train_and_sample, upload_cat
from subjectbooth.tests.fuzzing import is_clean

STYLE = "tiny_style.safetensors"
BOTH = f"both subject_lora and the file '{STYLE}'; needed: one of the two."
NEITHER = "no LoRA; needed: a link to subject_lora or a file in lora_name."


def _of_train_lora_node() -> dict[str, torch.Tensor]:
    """Named as by ComfyUI's TrainLoraNode: the model's own names, flat convolutions, norms as differences."""
    choose, tensors = torch.Generator().manual_seed(3), {}
    for name, weight in tiny.unet(0).items():
        layer = name.removeprefix("model.").removesuffix(".weight")
        if layer == name.removeprefix("model.") or "input_blocks.1.1." not in name:
            continue
        if weight.ndim == 1:
            tensors[f"{layer}.diff"] = 0.05 * torch.randn(weight.shape, generator=choose)
        else:
            tensors[f"{layer}.lora_up.weight"] = 0.2 * torch.randn(len(weight), 2, generator=choose)
            tensors[f"{layer}.lora_down.weight"] = 0.1 * torch.randn(2, weight[0].numel(), generator=choose)
            tensors[f"{layer}.alpha"] = torch.tensor(2.0)
    return tensors


def _of_diffusers(processor: str, up: str, down: str) -> dict[str, torch.Tensor]:
    choose, tensors = torch.Generator().manual_seed(4), {}
    for part in ("to_q", "to_v"):
        layer = f"unet.down_blocks.0.attentions.0.transformer_blocks.0.attn1.{processor}{part}"
        tensors[f"{layer}{up}.weight"] = 0.2 * torch.randn(tiny.CHANNELS, 4, generator=choose)
        tensors[f"{layer}{down}.weight"] = torch.randn(4, tiny.CHANNELS, generator=choose)
    return tensors


def _sampled_with(loader: str, lora_name: str) -> Graph:
    """"8" puts the file on the tiny model, text to image "2".."7" shows what it does."""
    graph = text_to_image(seed=1301, model=["8", 0], clip=["8", 1])
    applied = node(loader, model=["1", 0], clip=["1", 1], lora_name=lora_name, strength_model=1.0, strength_clip=1.0)
    if loader == "ApplySubjectLoRA":
        applied["inputs"]["prompt"] = "plain"
    return {**graph, "8": applied}


def _save(comfy: ComfyClient, name: str, tensors: dict[str, torch.Tensor]) -> str:
    assert comfy.server is not None
    safetensors.torch.save_file(tensors, comfy.server.models_dir / "loras" / f"{name}.safetensors")
    return f"{name}.safetensors"


@pytest.mark.parametrize("program", ["TrainLoraNode", "older diffusers"])
def test_a_file_with_dotted_names_is_applied_as_comfyui_does(comfy: ComfyClient, program: str) -> None:
    of_diffusers = _of_diffusers("processor.", "_lora.up", "_lora.down")
    name = _save(comfy, program, _of_train_lora_node() if program == "TrainLoraNode" else of_diffusers)
    plain, ours, theirs = (
        pixels(comfy, comfy.run(graph).images("7")[0])
        for graph in (text_to_image(seed=1301), _sampled_with("ApplySubjectLoRA", name),
                      _sampled_with("LoraLoader", name)))
    assert abs(ours - plain).mean() > 1
    assert np.array_equal(ours, theirs)


def test_a_file_with_dotted_names_that_comfyui_does_not_take_is_refused(comfy: ComfyClient) -> None:
    """diffusers' names of today, of which ComfyUI only logs that it knows none."""
    name = _save(comfy, "newer diffusers", _of_diffusers("", ".lora_B", ".lora_A"))
    with pytest.raises(NodeFailed) as failure:
        comfy.run(_sampled_with("ApplySubjectLoRA", name))
    assert "a LoRA of which this model takes 0 of 4 tensors; needed: a LoRA for" in failure.value.node_message
    assert is_clean(failure.value.node_message)


def test_two_loras_and_none_are_refused_before_anything_runs(comfy: ComfyClient) -> None:
    images = upload_cat(comfy)
    both = train_and_sample(images, seed=1302, steps=1, output_name="both", apply={"lora_name": STYLE})
    neither = text_to_image(seed=1302, model=["12", 0], clip=["12", 1])
    neither["12"] = apply_node()
    del neither["12"]["inputs"]["subject_lora"]
    since = len(comfy.events)
    for graph, sentence in ((both, BOTH), (neither, NEITHER)):
        with pytest.raises(PromptRejected) as failure:
            comfy.queue(graph, targets=("7",))
        said = refusals_of(failure.value)
        assert said and all(sentence in one and is_clean(one) for one in said), said
    assert not [event for event in comfy.events[since:] if event.type.startswith(("execut", "progress"))]
    # The trainer is an output of its own: whole graphs are told at once too, but it trains beside what is refused.
    answer = comfy.request("POST", "/prompt", {"prompt": both})
    assert all(BOTH in problem["details"] for problem in answer["node_errors"]["12"]["errors"])
    comfy.wait(answer["prompt_id"])
