"""The text encoder's own arithmetic, its LoRA, and its share of the steps."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Any

import pytest
import safetensors.torch
import torch
from transformers import CLIPTextConfig, CLIPTextModel, CLIPTextModelWithProjection

from subjectbooth.tests.small_base import (
    FAMILY,
    small_base,
    small_class_images,
    small_subject,
    small_text_encoder,
    with_text_encoders,
)
from subjectbooth.trainer.base.sd import clip_text
from subjectbooth.trainer.base.sd.clip_text import ClipText
from subjectbooth.trainer.base.sd.families import TextEncoderShape
from subjectbooth.trainer.base.sd.target_layers import text_target_layers
from subjectbooth.trainer.base.sd.text_encoder import (
    TokenChunks,
    build_text_encoder,
    encode,
    from_open_clip,
    used_layers,
)
from subjectbooth.trainer.base.stored.stored_base import token_chunks
from subjectbooth.trainer.config import TrainConfig, run_key
from subjectbooth.trainer.events import Finished, StepDone
from subjectbooth.trainer.learn import adapter
from subjectbooth.trainer.runs.run import Run

SETTINGS: dict[str, Any] = {
    "steps": 4,
    "learning_rate": 1e-3,
    "rank": 4,
    "network_alpha": 2.0,
    "resolution": 64,
    "train_batch_size": 2,
    "train_text_encoder": True,
    "text_encoder_lr": 1e-2,
}


def _encode(
    prompt: str,
    clip_layer: int | None = None,
    weights: torch.Tensor | None = None,
    **shape: Any,
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
        parts = [
            encode([small_text_encoder()], FAMILY.text_encoders, [(part,)], None)[0].hidden_states for part in each
        ]
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
    state = {
        "token_embedding.weight": torch.zeros(3, 2),
        "positional_embedding": torch.zeros(77, 2),
        "ln_final.bias": torch.zeros(2),
        "text_projection": torch.arange(4.0).reshape(2, 2),
        "transformer.resblocks.5.attn.in_proj_weight": torch.arange(12.0).reshape(6, 2),
        "transformer.resblocks.5.mlp.c_fc.bias": torch.zeros(8),
        "logit_scale": torch.zeros(()),
    }
    found = from_open_clip(state)
    assert torch.equal(found["text_model.encoder.layers.5.self_attn.k_proj.weight"], torch.arange(4.0, 8).reshape(2, 2))
    assert torch.equal(found["text_projection.weight"], torch.tensor([[0.0, 2.0], [1.0, 3.0]]))
    assert "text_model.encoder.layers.5.mlp.fc1.bias" in found
    assert "text_model.embeddings.position_embedding.weight" in found


def _train(root: Path, stops: tuple[int, ...] = (), **changes: Any) -> dict[str, torch.Tensor]:
    config = TrainConfig(**{**SETTINGS, **changes})
    for stop in (*stops, None):
        run = Run(small_base(), small_subject(), small_class_images(), config, root, torch.device("cpu"))
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
    run = Run(
        small_base(),
        small_subject(),
        small_class_images(),
        TrainConfig(**{**SETTINGS, "weight_decay": 0.0}),
        tmp_path / "two",
        torch.device("cpu"),
    )
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


def test_after_its_share_each_prompt_is_encoded_once_with_nothing_left_out(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    calls: list[tuple[int, bool, bool]] = []
    text = small_text_encoder()
    text.register_forward_pre_hook(lambda module, _: calls.append((steps[0], module.training, torch.is_grad_enabled())))
    base = with_text_encoders(small_base(), lambda dtype: [text])
    config = TrainConfig(
        **{
            **SETTINGS,
            "text_encoder_share": 0.5,
            "lora_dropout": 0.5,
            "steps": 6,
            "gradient_accumulation_steps": 2,
            "validation_interval": 0,
        }
    )
    run, steps = Run(base, small_subject(), small_class_images(), config, tmp_path, torch.device("cpu")), [0]
    for event in run.events():
        if isinstance(event, StepDone):
            steps[0] = event.step
    learning, final = [call for call in calls if call[0] < 3], [call for call in calls if call[0] >= 3]
    # The subject's prompt and the class's in each batch; then each of them once more for all that is left.
    assert learning == [(step, True, True) for step in range(3) for _ in range(4)]
    assert final == [(3, False, False)] * 2


def test_the_key_tells_runs_whose_dropout_ends_with_the_share_from_those_of_before() -> None:
    def key(**changes: Any) -> str:
        return run_key(TrainConfig(**{**SETTINGS, **changes}), "subject", "base", "priors", "ohwx dog")[:12]

    # As they were before dropout ended with the share; where nothing has changed they still are.
    assert key() == "518dd015fec6"
    assert key(lora_dropout=0.1) == "bba7c6d690dd"
    assert key(text_encoder_share=0.5) == "ce847b74db46"
    assert key(text_encoder_share=0.8, lora_dropout=0.1) == "e8f4cbd0e8c5"  # 3.2 steps: all 4 are trained
    assert key(text_encoder_share=0.75, lora_dropout=0.1) != "34fb8b446ddc"
    assert key(text_encoder_share=0.0, lora_dropout=0.1) != "8abb540373ac"


def _shape(name: str, layer: int, projects: bool, prefix: str) -> TextEncoderShape:
    return dataclasses.replace(
        FAMILY.text_encoders[0],
        name=name,
        width=8,
        layer=layer,
        projects=projects,
        norms_hidden_layer=not projects,
        prefix=prefix,
    )


def _encoder(shape: TextEncoderShape) -> torch.nn.Module:
    with torch.device("meta"):
        config = CLIPTextConfig(
            hidden_size=8,
            intermediate_size=32,
            num_hidden_layers=2,
            projection_dim=8,
            num_attention_heads=2,
            vocab_size=49408,
        )
        model = (CLIPTextModelWithProjection if shape.projects else CLIPTextModel)(config)
    random = torch.Generator().manual_seed(4)
    weights = {name: 0.3 * torch.randn(tensor.shape, generator=random) for name, tensor in model.state_dict().items()}
    return build_text_encoder(weights, shape, torch.float32, "test")


@pytest.mark.parametrize(
    ("layer", "projects", "clip_layer", "trained"),
    [
        (-1, False, None, {0, 1}),
        (-1, False, -2, {0}),
        (-2, False, None, {0}),
        (-2, False, -1, {0, 1}),
        (-2, True, None, {0, 1}),
        (-2, True, -2, {0, 1}),
        (-1, False, -3, {0, 1}),
    ],
    ids=[
        "SD 1.x",
        "SD 1.x, CLIP skip 2",
        "SD 2.x and SDXL's l",
        "with the last",
        "SDXL's g",
        "g, CLIP skip 2",
        "CLIP skip past the encoder",
    ],
)
def test_every_text_layer_that_has_a_lora_gets_a_gradient(
    layer: int, projects: bool, clip_layer: int | None, trained: set[int]
) -> None:
    shape = _shape("x", layer, projects, "lora_te")
    model = _encoder(shape)
    layers = text_target_layers(model, "all", used_layers(shape, clip_layer))
    parameters = adapter.inject(model, TrainConfig(rank=2, network_alpha=2.0, lora_targets="all"), layers)
    for parameter in parameters:  # the second half starts at 0, and the first half's gradient with it
        parameter.data += 0.1
    prompt = (TokenChunks(token_chunks("a photo of a dog", FAMILY)[0].ids, torch.ones(1, 77)),)
    made = encode([model], (shape,), [prompt], clip_layer)[0]
    loss = (made.hidden_states**2).sum()
    if made.pooled is not None:
        loss = loss + (made.pooled**2).sum()
    loss.backward()
    assert all(parameter.grad is not None and bool(parameter.grad.any()) for parameter in parameters)
    layers = {
        int(name.split("encoder.layers.")[1].split(".")[0])
        for name, parameter in model.named_parameters()
        if parameter.requires_grad
    }
    assert layers == trained


def test_a_checkpoint_with_a_lora_for_layers_that_are_not_used_goes_on(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As they were: with a number for each of those layers' weights, between the other encoders' ones."""
    shapes = _shape("l", -2, False, "lora_te1"), _shape("g", -1, True, "lora_te2")
    family = dataclasses.replace(FAMILY, text_encoders=shapes)
    base = dataclasses.replace(
        small_base(),
        text=ClipText(
            family,
            None,
            lambda prompt: token_chunks(prompt, family),
            lambda dtype: [_encoder(shape) for shape in shapes],
        ),
    )
    config = TrainConfig(**{**SETTINGS, "ema_decay": 0.9, "train_batch_size": 1})

    def train(root: Path, until: int) -> Run:
        run = Run(base, small_subject(), None, config, root, torch.device("cpu"))
        reading = run.events()
        for event in reading:
            if isinstance(event, StepDone) and event.step == until:
                reading.close()
                break
        return run

    whole = train(tmp_path / "whole", 5).folder.finished_lora(4)
    with monkeypatch.context() as before:
        before.setattr(clip_text, "used_layers", lambda shape, clip_layer: shape.layers)
        old = train(tmp_path / "old", 2).folder.load_checkpoint(4)
        finished = train(tmp_path / "finished", 5)
    cut = train(tmp_path / "old", 5).folder.finished_lora(4)
    assert whole is not None and cut is not None and old.step == 2
    assert any("lora_te1/" in name and "layers.1." in name for name in old.adapter)
    expected, found = safetensors.torch.load_file(whole), safetensors.torch.load_file(cut)
    assert expected.keys() == found.keys() and not any("te1" in name and "layers_1_" in name for name in found)
    assert all(torch.equal(expected[name], found[name]) for name in expected)
    # A finished run of then is found again, its file as it was, and all else in that file is what it is now.
    again = list(Run(base, small_subject(), None, config, tmp_path / "finished", torch.device("cpu")).events())
    path = finished.folder.finished_lora(4)
    assert again == [Finished(4, path, trained=False)] and path is not None
    dead = safetensors.torch.load_file(path)
    assert set(expected) < set(dead)
    assert all(torch.equal(expected[name], dead[name]) for name in expected)
    assert not any(bool(dead[name].any()) for name in set(dead) - set(expected) if "lora_up" in name)


def test_its_learning_rate_is_its_own(tmp_path: Path) -> None:
    slow, fast = _text(_train(tmp_path, text_encoder_lr=1e-6)), _text(_train(tmp_path, text_encoder_lr=1e-2))
    moved = [
        max(float(tensor.abs().max()) for name, tensor in state.items() if "lora_up" in name) for state in (slow, fast)
    ]
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
    run = Run(small_base(), small_subject(), small_class_images(), config, tmp_path, torch.device("cpu"))
    losses = [event.loss for event in run.events() if isinstance(event, StepDone)]
    assert len(losses) == 2
    path = run.folder.finished_lora(2)
    assert path is not None
    ups = [
        tensor
        for name, tensor in safetensors.torch.load(path.read_bytes()).items()
        if name.startswith("lora_te") and "lora_up" in name
    ]
    assert ups and all(bool(tensor.any()) for tensor in ups)
    chunks = token_chunks("a photo of a dog", FAMILY)
    with torch.no_grad():
        half = encode([small_text_encoder(torch.bfloat16)], FAMILY.text_encoders, [chunks], None)[0].hidden_states
    assert half.dtype == torch.float32
    # bf16 has 8 bits: a whole encoder in it is off by some hundredths.
    assert float((half - _encode("a photo of a dog")).abs().mean()) < 0.05
