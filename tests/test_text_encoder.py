"""The text encoder's own arithmetic, its LoRA, and its share of the steps."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Any

import pytest
import safetensors.torch
import torch

from subjectbooth.tests.small_base import FAMILY, small_base, small_priors, small_subject, small_text_encoder
from subjectbooth.trainer.config import TrainConfig
from subjectbooth.trainer.events import StepDone
from subjectbooth.trainer.run import Run
from subjectbooth.trainer.stored_base import token_chunks
from subjectbooth.trainer.text_encoder import TokenChunks, encode, from_open_clip

SETTINGS: dict[str, Any] = {
    "steps": 4, "learning_rate": 1e-3, "rank": 4, "network_alpha": 2.0, "resolution": 64, "train_batch_size": 2,
    "train_text_encoder": True, "text_encoder_lr": 1e-2,
}


def _encode(
    prompt: str, clip_layer: int | None = None, weights: torch.Tensor | None = None, **shape: Any,
) -> torch.Tensor:
    chunks = token_chunks(prompt, FAMILY)
    if weights is not None:
        chunks = (TokenChunks(chunks[0].ids, weights),)
    with torch.no_grad():
        shapes = (dataclasses.replace(FAMILY.text_encoders[0], **shape),)
        return encode([small_text_encoder()], shapes, [chunks], clip_layer)[0].hidden_states


def test_a_long_prompt_is_its_chunks_side_by_side() -> None:
    words = [f"dog{number}" for number in range(50)]
    chunks = token_chunks(" ".join(words), FAMILY)[0]
    assert len(chunks.ids) == 2
    each = [TokenChunks(chunks.ids[index][None], chunks.weights[index][None]) for index in range(2)]
    with torch.no_grad():
        parts = [encode([small_text_encoder()], FAMILY.text_encoders, [(part,)], None)[0].hidden_states
                 for part in each]
    torch.testing.assert_close(_encode(" ".join(words)), torch.cat(parts, dim=1))


def test_weights_move_tokens_away_from_the_empty_prompt() -> None:
    weights = torch.ones(1, 77)
    weights[0, 3] = 1.4
    plain, empty = _encode("a photo of a dog"), _encode("")
    expected = plain.clone()
    expected[0, 3] = empty[0, 3] + 1.4 * (plain[0, 3] - empty[0, 3])
    torch.testing.assert_close(_encode("a photo of a dog", weights=weights), expected, atol=1e-5, rtol=1e-5)


def test_clip_skip_takes_the_layer_before_and_norms_it() -> None:
    model = small_text_encoder()
    with torch.no_grad():
        states = model(input_ids=token_chunks("a dog", FAMILY)[0].ids, output_hidden_states=True).hidden_states
        norm = next(module for name, module in model.named_modules() if name.endswith("final_layer_norm"))
        torch.testing.assert_close(_encode("a dog", clip_layer=-2), norm(states[1]))
        torch.testing.assert_close(_encode("a dog"), norm(states[2]))
    assert float((_encode("a dog", clip_layer=-2) - _encode("a dog")).abs().max()) > 0.1


@pytest.mark.parametrize("clip_layer", [-3, -4, -24])
def test_a_clip_skip_past_the_first_layer_takes_the_last_as_comfyui_does(clip_layer: int) -> None:
    """comfy/sd1_clip.py, ``set_clip_options``: the last layer, with the final norm whether the family norms or not."""
    assert torch.equal(_encode("a dog", clip_layer=clip_layer), _encode("a dog"))
    unnormed = _encode("a dog", clip_layer=-1, norms_hidden_layer=False)
    past = _encode("a dog", clip_layer=clip_layer, norms_hidden_layer=False)
    assert torch.equal(past, _encode("a dog")) and not torch.equal(unnormed, past)
    assert not torch.equal(_encode("a dog", clip_layer=-2), past)  # the first layer still is one


def test_open_clip_names() -> None:
    state = {"token_embedding.weight": torch.zeros(3, 2), "positional_embedding": torch.zeros(77, 2),
             "ln_final.bias": torch.zeros(2), "text_projection": torch.arange(4.0).reshape(2, 2),
             "transformer.resblocks.5.attn.in_proj_weight": torch.arange(12.0).reshape(6, 2),
             "transformer.resblocks.5.mlp.c_fc.bias": torch.zeros(8), "logit_scale": torch.zeros(())}
    found = from_open_clip(state)
    assert torch.equal(found["text_model.encoder.layers.5.self_attn.k_proj.weight"], torch.arange(4.0, 8).reshape(2, 2))
    assert torch.equal(found["text_projection.weight"], torch.tensor([[0.0, 2.0], [1.0, 3.0]]))
    assert "text_model.encoder.layers.5.mlp.fc1.bias" in found
    assert "text_model.embeddings.position_embedding.weight" in found


def _train(root: Path, stops: tuple[int, ...] = (), **changes: Any) -> dict[str, torch.Tensor]:
    config = TrainConfig(**{**SETTINGS, **changes})
    for stop in (*stops, None):
        run = Run(small_base(), small_subject(), small_priors(), config, root, torch.device("cpu"))
        reading = run.events()
        for event in reading:
            if isinstance(event, StepDone) and event.step == stop:
                reading.close()
                break
    path = run.folder.finished_lora(4)
    assert path is not None
    return safetensors.torch.load_file(path)


def _text(tensors: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    return {name: tensor for name, tensor in tensors.items() if name.startswith("lora_te_text_model_encoder_layers_")}


@pytest.mark.oldest
def test_the_text_encoders_lora_learns_and_is_in_the_file(tmp_path: Path) -> None:
    tensors = _train(tmp_path)
    up = {name: tensor for name, tensor in _text(tensors).items() if "lora_up" in name}
    assert len(up) == 8  # q, k, v and out of two layers
    assert all(float(tensor.abs().max()) > 0 for tensor in up.values())
    assert set(tensors) - set(_text(tensors)) == {name for name in tensors if name.startswith("lora_unet_")}


@pytest.mark.oldest
def test_a_cancelled_run_with_text_encoder_ends_bit_identical(tmp_path: Path) -> None:
    whole, cut = _train(tmp_path / "whole", ema_decay=0.9), _train(tmp_path / "cut", (1, 3), ema_decay=0.9)
    assert all(torch.equal(whole[name], cut[name]) for name in whole)


def test_after_its_share_of_the_steps_it_stays_as_it_is(tmp_path: Path) -> None:
    half = _train(tmp_path / "half", text_encoder_share=0.5, weight_decay=0.0)
    # The first two steps of the same run, with the same settings but for the end.
    first = _train(tmp_path / "first", text_encoder_share=1.0, weight_decay=0.0)
    run = Run(small_base(), small_subject(), small_priors(), TrainConfig(**{**SETTINGS, "weight_decay": 0.0}),
              tmp_path / "two", torch.device("cpu"))
    reading = run.events()
    for event in reading:
        if isinstance(event, StepDone) and event.step == 2:
            reading.close()
            break
    path = run.folder.finished_lora(2)
    assert path is not None
    two = _text(safetensors.torch.load_file(path))
    assert all(torch.equal(two[name], _text(half)[name]) for name in two)
    assert any(not torch.equal(two[name], _text(first)[name]) for name in two)


def test_its_learning_rate_is_its_own(tmp_path: Path) -> None:
    slow, fast = _text(_train(tmp_path, text_encoder_lr=1e-6)), _text(_train(tmp_path, text_encoder_lr=1e-2))
    moved = [max(float(tensor.abs().max()) for name, tensor in state.items() if "lora_up" in name)
             for state in (slow, fast)]
    assert moved[0] < 1e-5 < 1e-3 < moved[1]


def test_the_key_knows_of_the_text_encoder_only_when_it_is_trained() -> None:
    on, off = TrainConfig(**SETTINGS), TrainConfig(**{**SETTINGS, "train_text_encoder": False})
    assert on.key_fields() != off.key_fields()
    assert dataclasses.replace(off, text_encoder_lr=1e-3).key_fields() == off.key_fields()
    assert "steps" not in on.key_fields()
    assert "steps" in dataclasses.replace(on, text_encoder_share=0.5).key_fields()


def test_in_half_precision_too_it_is_trained_and_normed(tmp_path: Path) -> None:
    """accelerate hands on float32 states, and the final norm's weights are bf16: on a card with bf16 that is auto."""
    config = TrainConfig(**{**SETTINGS, "precision": "bf16", "steps": 2})
    run = Run(small_base(), small_subject(), small_priors(), config, tmp_path, torch.device("cpu"))
    losses = [event.loss for event in run.events() if isinstance(event, StepDone)]
    assert len(losses) == 2
    path = run.folder.finished_lora(2)
    assert path is not None
    ups = [tensor for name, tensor in safetensors.torch.load(path.read_bytes()).items()
           if name.startswith("lora_te") and "lora_up" in name]
    assert ups and all(bool(tensor.any()) for tensor in ups)
    chunks = token_chunks("a photo of a dog", FAMILY)
    with torch.no_grad():
        half = encode([small_text_encoder(torch.bfloat16)], FAMILY.text_encoders, [chunks], None)[0].hidden_states
    assert half.dtype == torch.float32
    # bf16 has 8 bits: a whole encoder in it is off by some hundredths.
    assert float((half - _encode("a photo of a dog")).abs().mean()) < 0.05
