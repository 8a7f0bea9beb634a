"""A wired base is read alike with and without dynamic VRAM, and what cannot be trained on is refused in both.

The test's own figures are computed from the checkpoint's file, as ComfyUI 0.3.75 loads it: whoever updates ComfyUI
finds the runs of before.
"""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import safetensors.torch
import torch

from subjectbooth.tests.comfy_server import find_comfyui
from subjectbooth.trainer.files.storage import sha256_of

ROOT = Path(__file__).resolve().parents[2]
pytestmark = pytest.mark.comfy


@pytest.fixture(scope="module", params=["plain", "dynamic"])
def read(request: pytest.FixtureRequest, tiny_checkpoint: Path, tiny_style_lora: Path) -> dict[str, Any]:
    """What the pack reads in this mode, in a process of its own."""
    comfyui = find_comfyui(ROOT)
    assert comfyui is not None
    if request.param == "dynamic" and "class ModelPatcherDynamic" not in (
        comfyui / "comfy" / "model_patcher.py"
    ).read_text(encoding="utf-8"):
        pytest.skip("this ComfyUI has no dynamic VRAM")
    done = subprocess.run(
        [
            sys.executable,
            str(ROOT / "tests" / "nodes" / "wired_modes.py"),
            str(comfyui),
            request.param,
            str(tiny_checkpoint),
            str(tiny_style_lora),
        ],
        capture_output=True,
        text=True,
        timeout=300,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    found = json.loads(done.stdout.splitlines()[-1])
    assert found["patcher"] == {"plain": "ModelPatcher", "dynamic": "ModelPatcherDynamic"}[request.param]
    return dict(found)


def test_digest_and_weights_are_those_that_are_sampled_with(
    read: dict[str, Any], tiny_checkpoint: Path, tiny_style_lora: Path
) -> None:
    """The file is in fp32, what is sampled in fp16."""
    half = {name: tensor.half() for name, tensor in _unet(tiny_checkpoint).items()}
    assert read["kinds"] == [{"float16": 168}, {"float32": 196}, {"bfloat16": 136}]
    assert read["unet"] == _hash(half)
    taken = {name.removeprefix("diffusion_model."): tensor for name, tensor in half.items()}
    assert read["taken"][0] == _hash(taken)
    assert read["taken"][1] == _hash(_with_lora(taken, safetensors.torch.load_file(tiny_style_lora), 0.7))
    # Merged half and half with a model that is 1.1 times as large, rounded to fp16 before and after.
    other = {
        name.removeprefix("diffusion_model."): (tensor * 1.1).half() for name, tensor in _unet(tiny_checkpoint).items()
    }
    assert read["taken"][2] == _hash(
        {name: (tensor.float() * 0.5 + other[name].float() * 0.5).half() for name, tensor in taken.items()}
    )
    assert len({read["base"], read["styled"], read["unet"], read["merged"]}) == 4


def test_both_modes_give_the_same_digests(read: dict[str, Any], tiny_checkpoint: Path) -> None:
    """Of CLIP and VAE too; each mode is held against what the file says."""
    tensors = safetensors.torch.load_file(tiny_checkpoint)
    clip = {
        f"clip_l.{name.removeprefix('cond_stage_model.')}": tensor.float()
        for name, tensor in tensors.items()
        if name.startswith("cond_stage_model.")
    }
    vae = {
        name.removeprefix("first_stage_model."): tensor.bfloat16()
        for name, tensor in tensors.items()
        if name.startswith("first_stage_model.")
    }
    assert read["clip"] == _hash(clip)
    assert read["vae"] == _hash(vae)


def test_nothing_of_it_changes_when_a_patched_clone_was_loaded(read: dict[str, Any]) -> None:
    assert read["after loading"] == [read["base"], read["styled"], *read["taken"][:2]]


def test_what_is_used_in_fp8_is_refused_and_what_is_only_stored_in_it_is_not(read: dict[str, Any]) -> None:
    assert "quantised to float8_e4m3fn" in read["refused"]["used in fp8"]
    assert "quantised to float8_e4m3fn" in read["refused"]["taken in fp8"]
    assert read["refused"]["stored in fp8, used in fp16"] == ""
    rule = read["rule"]
    assert rule["stored"] == rule["used"]
    assert rule["kinds"] == {"diffusion_model.weight": "float16", "diffusion_model.bias": "float32"}
    assert "quantised to float8_e4m3fn" in rule["fp8"]


@pytest.mark.parametrize(
    ("case", "sentence"),
    [
        ("weight wrapper", "The MODEL has functions on its weights (diffusion_model.out.2.weight and others)"),
        ("bypass on MODEL", "The MODEL has a LoRA in bypass mode"),
        ("bypass on CLIP", "The CLIP has a LoRA in bypass mode"),
        ("quantised CLIP", "The CLIP is quantised (in ComfyUI's comfy_quant format)"),
        ("quantised MODEL", "The MODEL is quantised (in ComfyUI's comfy_quant format)"),
    ],
)
def test_each_is_refused_in_words_of_its_own(read: dict[str, Any], case: str, sentence: str) -> None:
    if case not in read["refused"]:
        pytest.skip("this ComfyUI has neither bypass LoRAs nor quantised text encoders")
    said = read["refused"][case]
    assert said.startswith(f"SubjectBoothError: {sentence}")
    assert ("ordinary LoRA loader" in said) == ("bypass" in case)


def test_a_graphs_errors_name_its_inputs(read: dict[str, Any]) -> None:
    assert read["own cause"] is False
    start = "SubjectBoothError: Given. Required: needed. Do."
    assert {name: said.removeprefix(start).strip() for name, said in read["topics"].items()} == {
        "NO_CLASS_IMAGES": "Connect Generate Class Priors to class_priors, or set preservation to curvature, which "
        "needs none.",
        "UNET": "Connect another MODEL.",
        "TEXT_ENCODER": "Connect another CLIP, or start ComfyUI with --fp32-text-enc; a damaged embedding: in a prompt "
        "is another usual cause.",
        "VAE": "Connect another VAE, or start ComfyUI with --fp32-vae.",
        "CLASS_IMAGES": "Where: class_priors",
        "CLASS_IMAGE_MODEL": "Connect the same MODEL and CLIP to Generate Class Priors and to the trainer. "
        "Where: class_priors",
        "MASK": "Or connect photos and their MASK to Load Subject Images.",
        "CROP": "Load Subject Images has the input crop.",
        "OUTPUT_FOLDER": "To use another one, start ComfyUI with --output-directory. Where: output folder",
        "RUN_IN_PROGRESS": "The other process is another ComfyUI, or a training from a shell. Where: run in progress",
        "LORA_FORMAT": "ComfyUI's own LoRA loader may be able to load it. Where: LoRA format",
        "PACKAGE": "Use ComfyUI's own Python for it, and restart ComfyUI afterwards. Where: Python package",
        "TORCH": "ComfyUI brings it: update ComfyUI (a newer portable version, or its requirements.txt). "
        "Where: PyTorch",
    }


def test_a_schedule_that_was_set_on_a_clone_stays_with_the_clone(read: dict[str, Any]) -> None:
    """ComfyUI itself mixes the two up with dynamic VRAM (ComfyUI#16490), in class images as well."""
    found = read["schedules"]
    (plain, plain_kind), (rescaled, rescaled_kind) = found["before"]
    assert (plain_kind, rescaled_kind) == ("epsilon", "v_prediction")
    assert plain == pytest.approx(0.00466, abs=1e-5)
    assert rescaled < 1e-6
    assert found["after"] == [found["before"]] * 2
    assert found["class images"] == [0, 0]
    assert found["effect"] > 0.1  # the schedule shows in a picture, or the line above would say nothing
    assert found["mixed up"] == [[0.00466, "epsilon"], [0.0, "v_prediction"]]


def test_an_attention_function_and_several_gpus_are_named_and_not_used(read: dict[str, Any]) -> None:
    found = read["ignored"]
    assert found["none"] == []
    assert ["attention override" in found["both"][0], "several GPUs" in found["both"][1]] == [True, True]
    assert found["dropped"] == ["optimized_attention_override"]
    assert found["class image"] == 0
    assert found["effect"] > 0.1


def test_a_lora_that_is_applied_again_is_not_patched_in_again(read: dict[str, Any]) -> None:
    """Its node runs again whenever the prompt on it is edited."""
    found = read["applied again"]
    assert found["read once"]
    assert found["latents again"] == found["latents first"] != found["latents stronger"]
    if read["patcher"] == "ModelPatcher":  # dynamic VRAM has its own function, and patches weights while they are used
        assert found["stronger"] == found["first"] > 0
        assert found["again"] == 0


def test_threads_that_put_a_lora_on_at_once_leave_the_model_as_it_was(read: dict[str, Any]) -> None:
    found = read["side by side"]
    assert found["on"] > 0
    assert (found["left"], found["attention"]) == (0, True)


def test_out_of_memory_is_told_from_other_errors(read: dict[str, Any]) -> None:
    found = read["out of memory"]
    assert "Lower batch_size" in found["torch"]
    assert "Lower batch_size" in found.get("accelerator", "Lower batch_size")
    assert found["another"] == "RuntimeError: shapes differ"
    assert found.get("another of it", "AcceleratorError").startswith("AcceleratorError")


def test_class_images_at_once_follow_the_memory_that_can_be_had(read: dict[str, Any]) -> None:
    """2 GB are free and CLIP's 5 GB can be. A model of 4 GB leaves room for 2 pictures of 1 GB, one that is loaded
    for 4; one that is streamed has 8 GB, as much as ComfyUI says, for 1.5 GB a picture."""
    assert read["batches"] == {"nothing loaded": 2, "loaded": 4, "streamed": 4, "not independent": 4}


def test_nothing_of_it_logs_that_it_is_deprecated(read: dict[str, Any]) -> None:
    assert read["logged"] == []


def _unet(checkpoint: Path) -> dict[str, torch.Tensor]:
    return {
        name.removeprefix("model."): tensor
        for name, tensor in safetensors.torch.load_file(checkpoint).items()
        if name.startswith("model.diffusion_model.")
    }


def _hash(tensors: dict[str, torch.Tensor]) -> str:
    return sha256_of("\n".join(sorted(f"{name} {sha256_of(tensor)}" for name, tensor in tensors.items())))


def _with_lora(
    weights: dict[str, torch.Tensor], lora: dict[str, torch.Tensor], strength: float
) -> dict[str, torch.Tensor]:
    """Merged in float32 and rounded once."""
    blocks = {
        "lora_unet_mid_block_attentions_0": "middle_block.1",
        "lora_unet_down_blocks_0_attentions_0": "input_blocks.1.1",
    }
    changed = dict(weights)
    for layer in {name.split(".")[0] for name in lora if name.startswith("lora_unet_")}:
        block, _, part = layer.partition("_transformer_blocks_0_")
        attention, _, projection = part.partition("_")
        name = f"{blocks[block]}.transformer_blocks.0.{attention}.{projection.replace('_0', '.0')}.weight"
        up, down, alpha = (lora[f"{layer}.{what}"] for what in ("lora_up.weight", "lora_down.weight", "alpha"))
        scale = strength * float(alpha) / len(down)
        changed[name] = (weights[name].float() + (scale * (up @ down)).reshape(weights[name].shape)).half()
    return changed
