"""A base whose own weights are not numbers is named before training, not taken for a fault of the photos."""

from __future__ import annotations

import dataclasses
from pathlib import Path

import pytest
import safetensors.torch
import torch

from subjectbooth.tests.layout_pair import NARROW, write_pair
from subjectbooth.tests.small_base import HashedPrompts, PoolingCodec, small_base, small_subject
from subjectbooth.trainer.base.conditioning import Conditioning, EncodedText
from subjectbooth.trainer.base.sd import families
from subjectbooth.trainer.base.stored.stored_base import load_base
from subjectbooth.trainer.config import TrainConfig
from subjectbooth.trainer.errors import SubjectBoothError
from subjectbooth.trainer.events import StepDone
from subjectbooth.trainer.runs.run import Run

CPU = torch.device("cpu")
CONFIG = TrainConfig(steps=2, rank=2, network_alpha=2.0, resolution=64)


@pytest.fixture(scope="module")
def sd1(tmp_path_factory: pytest.TempPathFactory) -> dict[str, torch.Tensor]:
    return safetensors.torch.load_file(write_pair(tmp_path_factory.mktemp("pair"), "SD 1.x")[0])


@pytest.mark.parametrize(
    ("weight", "value", "part", "named"),
    [
        ("model.diffusion_model.out.2.weight", "nan", "UNet", "'out.2.weight'"),
        ("model.diffusion_model.middle_block.0.in_layers.0.bias", "-inf", "UNet", "'middle_block.0.in_layers.0.bias'"),
        (
            "cond_stage_model.transformer.text_model.encoder.layers.1.mlp.fc1.weight",
            "nan",
            "text encoder",
            "encoder.layers.1.mlp.fc1.weight'",
        ),
        ("first_stage_model.encoder.conv_in.bias", "inf", "VAE", "'encoder.conv_in.bias'"),
    ],
)
def test_a_files_weight_that_is_not_a_number_is_named(
    sd1: dict[str, torch.Tensor],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    weight: str,
    value: str,
    part: str,
    named: str,
) -> None:
    monkeypatch.setattr(families, "FAMILIES", tuple(NARROW.values()))
    spoilt = sd1[weight].clone()
    spoilt.view(-1)[3] = float(value)
    path = tmp_path / "base.safetensors"
    safetensors.torch.save_file({**sd1, weight: spoilt}, path)
    with pytest.raises(SubjectBoothError) as refused:
        for event in Run(load_base(path), small_subject(), None, CONFIG, tmp_path / "runs", CPU).events():
            assert not isinstance(event, StepDone)
    assert f"the {part}'s weight " in refused.value.given and named in refused.value.given
    assert refused.value.where == str(path)
    assert "learning rate" not in str(refused.value) and "photo" not in str(refused.value)


def test_a_weight_that_half_precision_cannot_hold_is_told_from_a_broken_one(
    sd1: dict[str, torch.Tensor], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(families, "FAMILIES", tuple(NARROW.values()))
    path, name = tmp_path / "base.safetensors", "model.diffusion_model.out.2.bias"
    safetensors.torch.save_file({**sd1, name: sd1[name] + 1e5}, path)
    base = load_base(path)
    assert base.denoiser.build(torch.bfloat16) is not None
    with pytest.raises(SubjectBoothError, match="'out.2.bias' is too large for float16.*bf16 or fp32"):
        base.denoiser.build(torch.float16)


class _SpoiltPrompts(HashedPrompts):
    def __init__(self, word: str) -> None:
        self._word = word

    def encode(self, prompts: object) -> list[Conditioning]:
        return [
            EncodedText(found.hidden_states / (self._word not in prompt))
            for prompt, found in zip(prompts, super().encode(prompts), strict=True)
        ]  # type: ignore[arg-type,call-overload]


class _SpoiltCodec(PoolingCodec):
    def encode(self, images: torch.Tensor) -> torch.Tensor:
        return super().encode(images) * float("nan")


def test_a_wired_text_encoder_or_vae_that_gives_no_numbers_is_named(tmp_path: Path) -> None:
    """ComfyUI's own models encode there, so it shows in what they give."""
    broken = {
        "The text encoder turns every prompt": dataclasses.replace(small_base(), prompts=_SpoiltPrompts("")),
        "The text encoder turns the prompt 'a photo of ohwx dog'": dataclasses.replace(
            small_base(), prompts=_SpoiltPrompts("ohwx")
        ),
        "The VAE turns every photo": dataclasses.replace(small_base(), codec=_SpoiltCodec()),
    }
    for sentence, base in broken.items():
        with pytest.raises(SubjectBoothError) as refused:
            list(Run(base, small_subject(), None, CONFIG, tmp_path, CPU).events())
        assert sentence in str(refused.value)
        assert "learning rate" not in str(refused.value)
