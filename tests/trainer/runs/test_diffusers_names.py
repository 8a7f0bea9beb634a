"""LoRA files as diffusers and PEFT write them, saved by diffusers itself, read as kohya's."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import pytest
import safetensors.torch
import torch

from subjectbooth.trainer.errors import SubjectBoothError
from subjectbooth.trainer.runs.diffusers_names import ADAPTER_METADATA, with_kohya_names
from subjectbooth.trainer.runs.lora_reader import read_lora

DOWN, MID = "attentions_0_transformer_blocks_0_attn1_to_q", "attentions_0_transformer_blocks_0_attn2_to_out_0"
UNET = {  # by diffusers' own layer names: what kohya calls it
    "down_blocks.0.attentions.0.transformer_blocks.0.attn1.to_q": f"lora_unet_down_blocks_0_{DOWN}",
    "mid_block.attentions.0.transformer_blocks.0.attn2.to_out.0": f"lora_unet_mid_block_{MID}",
}
TEXT = {"text_model.encoder.layers.1.self_attn.q_proj": "lora_te{}_text_model_encoder_layers_1_self_attn_q_proj"}
RANK = 4


def _weights(layers: dict[str, str]) -> dict[str, torch.Tensor]:
    choose = torch.Generator().manual_seed(1)
    return {
        f"{layer}.lora_{part}.weight": torch.randn(shape, generator=choose)
        for layer in layers
        for part, shape in (("A", (RANK, 8)), ("B", (8, RANK)))
    }


def _effects(tensors: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """What every reader of kohya's files adds to each layer's weight."""
    effects = {}
    for name, up in tensors.items():
        layer, _, kind = name.partition(".")
        if kind == "lora_up.weight":
            down = tensors[f"{layer}.lora_down.weight"]
            effects[layer] = float(tensors.get(f"{layer}.alpha", len(down))) / len(down) * up @ down
    return effects


def _expected(scale: float, text: tuple[int, ...]) -> dict[str, torch.Tensor]:
    names = {
        **{layer: [name] for layer, name in UNET.items()},
        **{layer: [name.format(number) for number in text] for layer, name in TEXT.items()},
    }
    weights = _weights(UNET) | _weights(TEXT)
    return {
        name: scale * weights[f"{layer}.lora_B.weight"] @ weights[f"{layer}.lora_A.weight"]
        for layer, kohya in names.items()
        for name in kohya
    }


@pytest.mark.parametrize("spelling", ["PEFT's", "diffusers'"])
@pytest.mark.parametrize(
    ("settings", "scale"),
    [(None, 1.0), ({"r": RANK, "lora_alpha": 8}, 2.0), ({"r": RANK, "lora_alpha": 8, "use_rslora": True}, 8 / 2)],
)
@pytest.mark.parametrize("family", ["SD", "SDXL"])
def test_what_diffusers_saves_has_the_effect_of_kohyas_file(
    tmp_path: Path, family: str, settings: dict[str, Any] | None, scale: float, spelling: str
) -> None:
    from diffusers import StableDiffusionPipeline, StableDiffusionXLPipeline
    from diffusers.utils import convert_state_dict_to_diffusers

    def spelt(layers: dict[str, str]) -> dict[str, torch.Tensor]:
        weights = _weights(layers)
        return convert_state_dict_to_diffusers(weights) if spelling == "diffusers'" else weights

    pipeline, encoders = (
        (StableDiffusionPipeline, ["text_encoder"])
        if family == "SD"
        else (StableDiffusionXLPipeline, ["text_encoder", "text_encoder_2"])
    )
    pipeline.save_lora_weights(
        tmp_path,
        unet_lora_layers=spelt(UNET),
        unet_lora_adapter_metadata=settings,
        **{f"{encoder}_lora_layers": spelt(TEXT) for encoder in encoders},
        **{f"{encoder}_lora_adapter_metadata": settings for encoder in encoders},
    )
    tensors, metadata = read_lora(tmp_path / "pytorch_lora_weights.safetensors")
    assert (ADAPTER_METADATA in metadata) == (settings is not None)
    expected = _expected(scale, (1,) if family == "SD" else (1, 2))
    effects = _effects(tensors)
    assert effects.keys() == expected.keys()
    for layer, effect in effects.items():
        torch.testing.assert_close(effect, expected[layer])


@pytest.mark.parametrize(
    "written",
    [
        "base_model.model.{layer}.lora_{part}.weight",
        "{layer}.lora_{part}.weight",
        "{layer}.lora_{part}.default.weight",
        "unet.base_model.model.{layer}.lora_{part}.weight",
        "unet.{layer}.lora.{direction}.weight",
        "unet.{layer}.lora_linear_layer.{direction}.weight",
    ],
)
def test_every_spelling_is_read(written: str) -> None:
    weights = _weights(UNET)
    direction = {"A": "down", "B": "up"}
    tensors = {
        written.format(layer=layer, part=part, direction=direction[part]): weights[f"{layer}.lora_{part}.weight"]
        for layer in UNET
        for part in "AB"
    }
    assert _effects(with_kohya_names(tensors, {})).keys() == set(UNET.values())


def test_what_older_releases_wrote_is_read() -> None:
    tensors = {
        "unet.mid_block.attentions.0.transformer_blocks.0.attn2.processor.to_out_lora.up.weight": 1,
        "text_encoder.text_model.encoder.layers.1.self_attn.to_q_lora.down.weight": 2,
        "text_encoder.encoder.layers.1.self_attn.q_proj.lora_linear_layer.up.weight": 3,
    }  # transformers 5.6
    names = with_kohya_names({name: torch.tensor(value) for name, value in tensors.items()}, {})
    assert {name: int(value) for name, value in names.items()} == {
        f"{UNET['mid_block.attentions.0.transformer_blocks.0.attn2.to_out.0']}.lora_up.weight": 1,
        "lora_te1_text_model_encoder_layers_1_self_attn_q_proj.lora_down.weight": 2,
        "lora_te1_text_model_encoder_layers_1_self_attn_q_proj.lora_up.weight": 3,
    }


def _saved_by_peft(folder: Path, config: str) -> Path:
    safetensors.torch.save_file(
        {f"base_model.model.{name}": tensor for name, tensor in _weights(UNET).items()},
        folder / "adapter_model.safetensors",
    )
    (folder / "adapter_config.json").write_text(config, "utf-8")
    return folder / "adapter_model.safetensors"


def test_pefts_settings_next_to_its_file_count(tmp_path: Path) -> None:
    config = {"r": RANK, "lora_alpha": 2, "alpha_pattern": {"attn2.to_out.0": 12}}
    tensors, _ = read_lora(_saved_by_peft(tmp_path, json.dumps(config)))
    assert [float(tensors[f"{name}.alpha"]) for name in UNET.values()] == [2.0, 12.0]


@pytest.mark.parametrize(
    ("config", "said"),
    [
        ("[]", "not a JSON object"),
        ("{", "not a JSON object"),
        ('{"lora_alpha": "8"}', "The alpha '8'"),
        ('{"lora_alpha": NaN}', "The alpha 'nan'"),
    ],
)
def test_settings_that_make_no_sense_are_rejected(tmp_path: Path, config: str, said: str) -> None:
    with pytest.raises(SubjectBoothError, match=said):
        read_lora(_saved_by_peft(tmp_path, config))


def test_biases_and_magnitudes() -> None:
    layer, name = next(iter(UNET.items()))
    tensors = {
        **_weights({layer: name}),
        f"{layer}.lora_B.bias": torch.ones(8),
        f"{layer}.lora_magnitude_vector": torch.ones(8),
    }
    settings = {ADAPTER_METADATA: json.dumps({"unet.lora_alpha": 6, "unet.r": RANK})}
    renamed = with_kohya_names(tensors, settings)
    assert float(renamed[f"{name}.diff_b"][0]) == pytest.approx(6 / RANK)
    assert renamed[f"{name}.dora_scale"].shape == (8, 1)
    assert math.isclose(float(renamed[f"{name}.alpha"]), 6)


def test_other_names_stay_as_they_are() -> None:
    names = [
        "lora_unet_down_blocks_0_attentions_0_proj_in.lora_down.weight",
        "transformer.blocks.0.to_q.lora_A.weight",
        "diffusion_model.input_blocks.1.1.proj_in.lora_up.weight",
        "bundle_emb.cat.clip_l",
        "a.b",
        "x",
        "lora_te1_text_model_encoder_layers_0_mlp_fc1.alpha",
        "unet.strange.lora_A.weight",
    ]
    tensors = {name: torch.zeros(2, 2) for name in names}
    assert with_kohya_names(tensors, {ADAPTER_METADATA: "{"}).keys() == tensors.keys()
