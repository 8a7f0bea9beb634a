"""ApplySubjectLoRA with files of other programs, and what it refuses before anything runs."""

from __future__ import annotations

import re

import numpy as np
import pytest
import safetensors.torch
import torch

from subjectbooth.tests import tiny
from subjectbooth.tests.comfy_server import ComfyClient, NodeFailed, PromptRejected
from subjectbooth.tests.fuzzing import is_clean
from subjectbooth.tests.nodes.fuzz_values import refusals_of
from subjectbooth.tests.nodes.graphs import Graph, node, text_to_image
from subjectbooth.tests.nodes.test_harness import pixels
from subjectbooth.tests.nodes.training_graphs import apply_node, train_and_sample, upload_cat

STYLE = "tiny_style.safetensors"
BOTH = f"Both subject_lora and the file '{STYLE}' are given. Required: one of the two."
NEITHER = "No LoRA is given. Required: a connection to subject_lora or a file in lora_name."


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
    """ "8" puts the file on the tiny model, text to image "2".."7" shows what it does."""
    graph = text_to_image(seed=1301, model=["8", 0], clip=["8", 1])
    applied = node(loader, model=["1", 0], clip=["1", 1], lora_name=lora_name, strength_model=1.0, strength_clip=1.0)
    if loader == "ApplySubjectLoRA":
        applied["inputs"]["prompt"] = "plain"
    return {**graph, "8": applied}


def _save(comfy: ComfyClient, name: str, tensors: dict[str, torch.Tensor]) -> str:
    assert comfy.server is not None
    own = {key: tensor.clone() for key, tensor in tensors.items()}  # some of a test's are one and the same
    safetensors.torch.save_file(own, comfy.server.models_dir / "loras" / f"{name}.safetensors")
    return f"{name}.safetensors"


def _of_kohya() -> dict[str, torch.Tensor]:
    """The file of :func:`_of_diffusers` as kohya's scripts write it."""
    renamed = {}
    for name, tensor in _of_diffusers("", ".lora_B", ".lora_A").items():
        layer, kind, _ = name.removeprefix("unet.").rsplit(".", 2)
        direction = "up" if kind == "lora_B" else "down"
        renamed[f"lora_unet_{layer.replace('.', '_')}.lora_{direction}.weight"] = tensor
    return renamed


@pytest.mark.parametrize("program", ["TrainLoraNode", "older diffusers", "newer diffusers"])
def test_a_file_with_dotted_names_is_applied_as_comfyui_does(comfy: ComfyClient, program: str) -> None:
    """ComfyUI itself knows none of the names that diffusers writes today: it is given kohya's for them."""
    files = {
        "TrainLoraNode": _of_train_lora_node(),
        "newer diffusers": _of_diffusers("", ".lora_B", ".lora_A"),
        "older diffusers": _of_diffusers("processor.", "_lora.up", "_lora.down"),
    }
    name = _save(comfy, program, files[program])
    known = _save(comfy, "of kohya", _of_kohya()) if program == "newer diffusers" else name
    plain, ours, theirs = (
        pixels(comfy, comfy.run(graph).images("7")[0])
        for graph in (
            text_to_image(seed=1301),
            _sampled_with("ApplySubjectLoRA", name),
            _sampled_with("LoraLoader", known),
        )
    )
    assert abs(ours - plain).mean() > 1
    assert np.array_equal(ours, theirs)


LAYER = "lora_unet_down_blocks_0_attentions_0_transformer_blocks_0_attn1_to_q"  # 320 wide


def _kinds(width: int) -> dict[str, dict[str, torch.Tensor]]:
    """Every kind of adapter that ComfyUI knows, for a layer of this width."""
    choose = torch.Generator().manual_seed(width)

    def some(*shape: int) -> torch.Tensor:
        return 0.1 * torch.randn(shape, generator=choose)

    up, down, alpha = some(width, 4), some(4, width), torch.tensor(2.0)
    of_320 = {"lora_up.weight": some(320, 4), "lora_down.weight": some(4, 320), "alpha": alpha}
    return {
        "LoRA": {"lora_up.weight": up, "lora_down.weight": down, "alpha": alpha},
        "DoRA": {**of_320, "dora_scale": 1 + some(width, 1)},
        "DoRA over the inputs": {**of_320, "dora_scale": 1 + some(1, width)},
        "LoHa": {"hada_w1_a": up, "hada_w1_b": down, "hada_w2_a": up, "hada_w2_b": down, "alpha": alpha},
        "LoKr": {"lokr_w1": some(8, 8), "lokr_w2": some(width // 8, width // 8)},
        "LoKr of factors": {
            "lokr_w1": some(8, 8),
            "lokr_w2_a": some(width // 8, 4),
            "lokr_w2_b": some(4, width // 8),
            "alpha": alpha,
        },
        "OFT": {"oft_blocks": some(8, width // 8, width // 8)},
        "constrained OFT": {"oft_blocks": some(8, width // 8, width // 8), "alpha": torch.tensor(0.01)},
        "BOFT": {"oft_blocks": some(3, width // 8, 8, 8), "alpha": torch.tensor(0.01)},
        "GLoRA": {"a1.weight": up, "a2.weight": down, "b1.weight": up, "b2.weight": down, "alpha": alpha},
        "older GLoRA": {"a1.weight": down, "a2.weight": up, "b1.weight": down, "b2.weight": up, "alpha": alpha},
        "difference": {"diff": some(width, width)},
        "difference of a bias": {"diff_b": some(width)},
        "weight": {"set_weight": some(width, width)},
    }


def _applied(comfy: ComfyClient, lora_name: str) -> list[str]:
    """The lines that the node shows."""
    graph = {
        "1": node("CheckpointLoaderSimple", ckpt_name="tiny15.safetensors"),
        "12": apply_node(lora_name=lora_name, prompt="plain"),
        "13": node("ProbeValue", value=["12", 2]),
    }
    del graph["12"]["inputs"]["subject_lora"]
    result = comfy.run(graph)
    shown = [event.data["text"] for event in result.of_type("progress_text")]
    assert shown[-1].splitlines() == result.outputs["12"]["text"]
    return result.outputs["12"]["text"]


@pytest.mark.parametrize("kind", list(_kinds(320)))
def test_a_layer_of_another_width_is_refused_whatever_its_kind(comfy: ComfyClient, kind: str) -> None:
    """ComfyUI logs a line and samples without it."""
    # The attention's other projections have no bias.
    layer = LAYER.replace("to_q", "to_out_0") if "bias" in kind else LAYER
    fitting, other = (
        _save(comfy, f"{kind} {width}", {f"{layer}.{part}": tensor for part, tensor in _kinds(width)[kind].items()})
        for width in (320, 640)
    )
    assert _applied(comfy, fitting) == ["applied: all 1 layers"]
    with pytest.raises(NodeFailed) as failure:
        _applied(comfy, other)
    said = failure.value.node_message
    assert re.search(r"has the shapes \[.+, but the model's weight has \[320(, 320)?\]\. Required: a LoRA for", said), (
        said
    )
    assert "transformer_blocks.0.attn1.to_" in said
    assert is_clean(said)


def test_what_is_not_used_is_shown_on_the_node(comfy: ComfyClient) -> None:
    lora = {f"{LAYER}.{part}": tensor for part, tensor in _kinds(320)["LoRA"].items()}
    others = {
        key.replace("blocks_0_attn1", f"blocks_{number}_attn1"): tensor
        for key, tensor in lora.items()
        for number in range(1, 40)
    }
    few, more = _applied(comfy, _save(comfy, "of 40", {**lora, **others})), "transformer_blocks_10_attn1_to_q'"
    assert len(few) == 1 and few[0].startswith("Only 1 of 40 layers fit this model;") and more in few[0]
    bundled = {f"bundle_emb.{name}.string_to_param.*": torch.ones(2, 768) for name in ("cat", "dog")}
    with_embeddings = _applied(comfy, _save(comfy, "bundled", {**lora, **bundled}))
    assert with_embeddings[0] == "applied: all 1 layers"
    assert with_embeddings[1].startswith("The file contains 2 embeddings ('cat', ...), not used here;")
    for kind, zero in (
        ("LoRA", "lora_up"),
        ("LoHa", "hada_w2_b"),
        ("OFT", "oft_blocks"),
        ("difference", "diff"),
        ("GLoRA", "alpha"),
        ("LoKr", ""),
    ):
        tensors = {
            f"{LAYER}.{part}": torch.zeros_like(tensor) if zero and part.startswith(zero) else tensor
            for part, tensor in _kinds(320)[kind].items()
        }
        lines = _applied(comfy, _save(comfy, f"{kind} of zeros", tensors))
        assert [line.startswith("The LoRA has no effect:") for line in lines[1:]] == [True] * bool(zero), kind


def test_a_lora_of_another_kind_of_model_is_refused(comfy: ComfyClient) -> None:
    tensors = {
        f"transformer.single_transformer_blocks.{number}.attn.to_q.lora_{part}.weight": torch.ones(4, 4)
        for number in range(3)
        for part in "AB"
    }
    with pytest.raises(NodeFailed) as failure:
        _applied(comfy, _save(comfy, "of Flux", tensors))
    assert "None of the LoRA's 3 layers fit this model. Required: a LoRA for" in failure.value.node_message
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
