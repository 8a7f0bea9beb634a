"""What is wired is what is trained on: a merge with a LoRA on MODEL and on CLIP, a VAE of its own, CLIP skip and
ModelSamplingDiscrete give the losses that one checkpoint with all of it worked in gives from the shell."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator
from pathlib import Path

import pytest
import safetensors.torch
import torch

from subjectbooth.tests.comfy_server import ComfyClient
from subjectbooth.tests.nodes.graphs import node
from subjectbooth.tests.nodes.test_shell import losses_of, run_here, write_photos
from subjectbooth.tests.nodes.training_graphs import SIZE, cat_photos, subject_node, train_node, upload_cat
from subjectbooth.trainer.base.stored.stored_base import BaseModel, load_base
from subjectbooth.trainer.config import TrainConfig
from subjectbooth.trainer.events import StepDone
from subjectbooth.trainer.runs.run import Run

ON_MODEL, ON_CLIP, KEPT = 2.0, 6.0, 0.25
"""Strengths of the style LoRA, and how much of the plain model is in the merge."""

WHERE = {
    "lora_unet_mid_block_attentions_0_transformer_blocks_0_": "model.diffusion_model.middle_block.1.",
    "lora_unet_down_blocks_0_attentions_0_transformer_blocks_0_": "model.diffusion_model.input_blocks.1.1.",
}


def _target(layer: str) -> tuple[str, float]:
    """The weight that a layer of the style LoRA changes, and how strongly it does here."""
    for prefix, block in WHERE.items():
        if layer.startswith(prefix):
            attention, part = layer.removeprefix(prefix).split("_", 1)
            part = part.replace("to_out_0", "to_out.0")
            return f"{block}transformer_blocks.0.{attention}.{part}.weight", ON_MODEL * (1 - KEPT)
    assert layer == "lora_te_text_model_encoder_layers_0_self_attn_q_proj"
    return "cond_stage_model.transformer.text_model.encoder.layers.0.self_attn.q_proj.weight", ON_CLIP * (1 - KEPT)


def _other_vae(checkpoint: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """The same autoencoder with latents of another size, so that it cannot be mistaken for the checkpoint's own."""
    vae = {
        name.removeprefix("first_stage_model."): tensor.clone()
        for name, tensor in checkpoint.items()
        if name.startswith("first_stage_model.")
    }
    last = next(
        name
        for name in vae
        if name.startswith("taesd_encoder.") and vae[name].shape[:1] == (4,) and name.endswith("weight")
    )
    vae[last] *= 0.6
    return vae


@pytest.fixture(scope="module")
def baked(
    tiny_checkpoint: Path, tiny_style_lora: Path, tmp_path_factory: pytest.TempPathFactory
) -> Iterator[tuple[Path, Path]]:
    """A checkpoint with all of it worked in, and the VAE alone."""
    folder = tmp_path_factory.mktemp("baked")
    checkpoint = safetensors.torch.load_file(tiny_checkpoint)
    lora = safetensors.torch.load_file(tiny_style_lora)
    for layer in {name.split(".")[0] for name in lora}:
        name, strength = _target(layer)
        up, down, alpha = (lora[f"{layer}.{part}"] for part in ("lora_up.weight", "lora_down.weight", "alpha"))
        change = up @ down * (alpha / len(down)) * strength
        checkpoint[name] = checkpoint[name].float() + change.reshape(checkpoint[name].shape)
    vae = _other_vae(checkpoint)
    checkpoint |= {f"first_stage_model.{name}": tensor for name, tensor in vae.items()}
    checkpoint |= {"v_pred": torch.zeros(1), "ztsnr": torch.zeros(1)}
    safetensors.torch.save_file(checkpoint, folder / "baked.safetensors")
    safetensors.torch.save_file(vae, folder / "vae.safetensors")
    yield folder / "baked.safetensors", folder / "vae.safetensors"
    (folder / "baked.safetensors").unlink()


@pytest.mark.parametrize("with_text", [False, True])
def test_training_follows_all_that_is_wired(
    comfy: ComfyClient, baked: tuple[Path, Path], tmp_path: Path, with_text: bool
) -> None:
    checkpoint, vae = baked
    (comfy.server.models_dir / "vae").mkdir(exist_ok=True)
    (comfy.server.models_dir / "vae" / "other.safetensors").write_bytes(vae.read_bytes())
    seed = 70 + with_text
    options = comfy.defaults("DreamBoothOptions")
    graph = {
        "1": node("CheckpointLoaderSimple", ckpt_name="tiny15.safetensors"),
        "2": node(
            "LoraLoader",
            model=["1", 0],
            clip=["1", 1],
            lora_name="tiny_style.safetensors",
            strength_model=ON_MODEL,
            strength_clip=ON_CLIP,
        ),
        "3": node("ModelMergeSimple", model1=["1", 0], model2=["2", 0], ratio=KEPT),
        "4": node("ModelSamplingDiscrete", model=["8", 0], sampling="v_prediction", zsnr=True),
        "5": node("CLIPMergeSimple", clip1=["1", 1], clip2=["2", 1], ratio=KEPT),
        "6": node("CLIPSetLastLayer", clip=["5", 0], stop_at_clip_layer=-2),
        "7": node("VAELoader", vae_name="other.safetensors"),
        "8": node("ProbeAttention", model=["3", 0]),
        "9": node("DreamBoothOptions", **{**options, "train_text_encoder": with_text, "text_encoder_lr": 0.01}),
        "10": subject_node(upload_cat(comfy)),
        "11": train_node(
            model=("4", 0),
            clip=("6", 0),
            vae=["7", 0],
            steps=3,
            learning_rate=0.01,
            seed=seed,
            options=["9", 0],
            output_name=f"wired_{seed}",
        ),
    }
    result = comfy.run(graph)
    text = result.outputs["11"]["text"]
    assert "matched" in text[0]
    assert any("attention override" in line and "not used for training" in line for line in text)
    done = run_here(
        "--base",
        str(checkpoint),
        "--clip_skip",
        "2",
        "--photos",
        str(write_photos(tmp_path / "photos")),
        "--class-word",
        "cat",
        "--output_dir",
        str(tmp_path / "out"),
        "--resolution",
        str(SIZE),
        "--steps",
        "3",
        "--rank",
        "4",
        "--network_alpha",
        "2",
        "--learning_rate",
        "0.01",
        "--seed",
        str(seed),
        "--cpu",
        "--preservation",
        "none",
        *(["--train_text_encoder", "--text_encoder_lr", "0.01"] if with_text else []),
    )
    assert done.returncode == 0, done.stderr
    losses = (
        losses_of(tmp_path / "out" / "runs", seed, 3),
        losses_of(comfy.server.output_dir / "subjectbooth", seed, 3),
    )
    print(f"losses from the shell {losses[0]}, in ComfyUI {losses[1]}")
    assert losses[0] == pytest.approx(losses[1], rel=2e-4)


def test_each_part_of_it_changes_the_loss(baked: tuple[Path, Path], tiny_checkpoint: Path, tmp_path: Path) -> None:
    """Or the test above would say nothing about that part."""
    whole, plain = load_base(baked[0], clip_skip=2), load_base(tiny_checkpoint)
    plain_weights = dataclasses.replace(plain.denoiser, noise_scheduler=whole.denoiser.noise_scheduler)
    plain_noise = dataclasses.replace(whole.denoiser, noise_scheduler=plain.denoiser.noise_scheduler)
    without = {
        "nothing": whole,
        "LoRA on MODEL": dataclasses.replace(whole, denoiser=plain_weights),
        "LoRA on CLIP": dataclasses.replace(whole, prompts=load_base(tiny_checkpoint, clip_skip=2).prompts),
        "CLIP skip": dataclasses.replace(whole, prompts=load_base(baked[0]).prompts),
        "VAE": dataclasses.replace(whole, codec=plain.codec),
        "ModelSamplingDiscrete": dataclasses.replace(whole, denoiser=plain_noise),
    }
    losses = {name: _first_loss(base, tmp_path / str(number)) for number, (name, base) in enumerate(without.items())}
    print(losses)
    for name, loss in losses.items():
        if name != "nothing":
            assert abs(loss / losses["nothing"] - 1) > 1e-3, name


def _first_loss(base: BaseModel, root: Path) -> float:
    from argparse import Namespace

    from subjectbooth.trainer.shell.recipe import read_subject

    root.mkdir()
    photos = root / "photos"
    photos.mkdir()
    for number, content in enumerate(cat_photos()):
        (photos / f"{number}.png").write_bytes(content)
    subject = read_subject(
        Namespace(
            photos=photos,
            class_word="cat",
            token="ohwx",
            crop="center",
            captions="auto",
            prompt_template="a photo of {token} {class}",
        ),
        SIZE,
    )
    config = TrainConfig(steps=3, learning_rate=0.01, rank=4, network_alpha=2.0, resolution=SIZE, seed=70)
    events = Run(base, subject, None, config, root / "runs", torch.device("cpu")).events()
    for event in events:
        if isinstance(event, StepDone):
            events.close()
            return event.loss
    raise AssertionError("no step was made")
