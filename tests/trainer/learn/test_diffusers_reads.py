"""diffusers' own load_lora_weights reads the files of every family, as docs/compatibility.md says."""

from __future__ import annotations

from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch

from subjectbooth.tests.layout_pair import NARROW, write_pair
from subjectbooth.tests.small_base import with_lora
from subjectbooth.trainer.base.base_model import BaseModel
from subjectbooth.trainer.base.sd import families
from subjectbooth.trainer.base.sd.target_layers import text_target_layers
from subjectbooth.trainer.base.sd.unet import predict
from subjectbooth.trainer.base.stored.stored_base import load_base
from subjectbooth.trainer.config import TrainConfig
from subjectbooth.trainer.files.safetensors_file import to_bytes
from subjectbooth.trainer.learn import adapter


def _with_adapter(base: BaseModel, config: TrainConfig, path: Path) -> tuple[Any, list[Any]]:
    """UNet and text encoders as they are trained, with an adapter that does something; the file is written as usual."""
    unet, encoders = base.denoiser.build(torch.float32), base.text.build(torch.float32)
    trained = with_lora(unet, config)
    for encoder in encoders.values():
        trained += adapter.inject(encoder, config, text_target_layers(encoder, config.lora_targets))
    choose, alpha = torch.Generator().manual_seed(7), adapter.file_alpha(config)
    with torch.no_grad():
        for parameter in trained:
            parameter.copy_(0.3 * torch.randn(parameter.shape, generator=choose))
    file = adapter.to_file(adapter.adapter_state(unet), base.denoiser.file_key, alpha)
    for prefix, encoder in encoders.items():
        file |= adapter.to_file(adapter.adapter_state(encoder), partial(base.text.file_key, prefix), alpha)
    path.write_bytes(to_bytes(file, {}))
    return unet, list(encoders.values())


def _pipeline(base: BaseModel, folder: Path) -> Any:
    """diffusers' own, with the same weights; nothing but the UNet and the text encoders is asked of it."""
    from diffusers import StableDiffusionPipeline, StableDiffusionXLPipeline, UNet2DConditionModel

    unet = UNet2DConditionModel.from_pretrained(folder / "unet")
    encoders = list(base.text.build(torch.float32).values())
    if len(encoders) == 2:
        return StableDiffusionXLPipeline(
            vae=None,
            unet=unet,
            scheduler=None,
            text_encoder=encoders[0],
            text_encoder_2=encoders[1],
            tokenizer=None,
            tokenizer_2=None,
        )
    return StableDiffusionPipeline(
        vae=None,
        unet=unet,
        scheduler=None,
        text_encoder=encoders[0],
        tokenizer=None,
        safety_checker=None,
        feature_extractor=None,
        requires_safety_checker=False,
    )


@pytest.mark.parametrize("name", list(NARROW))
def test_diffusers_reads_the_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, name: str) -> None:
    """An alpha that is not the rank, and rank-stabilised LoRA; text encoders too."""
    monkeypatch.setattr(families, "FAMILIES", tuple(NARROW.values()))
    single, folder = write_pair(tmp_path, name)
    base = load_base(single)
    conditioning = base.prompts.encode(["a photo of ohwx dog"])[0]
    noise = torch.randn(1, 4, 8, 8, generator=torch.Generator().manual_seed(1))
    words = torch.randint(0, 49000, (1, 77), generator=torch.Generator().manual_seed(2))

    def outputs(unet: Any, encoders: list[Any]) -> list[torch.Tensor]:
        with torch.no_grad():
            return [
                predict(unet, noise, torch.tensor([500]), conditioning),
                *(encoder(words, output_hidden_states=True).hidden_states[-1] for encoder in encoders),
            ]

    pipeline = _pipeline(base, folder)
    theirs = [getattr(pipeline, part) for part in ("text_encoder", "text_encoder_2") if hasattr(pipeline, part)]
    without = outputs(pipeline.unet, theirs)
    for use_rslora in (False, True):
        config = TrainConfig(rank=3, network_alpha=2.0, use_rslora=use_rslora, lora_targets="attention+mlp")
        trained = outputs(*_with_adapter(base, config, tmp_path / "rex.safetensors"))
        pipeline.load_lora_weights(tmp_path, weight_name="rex.safetensors")
        for plain, ours, read in zip(without, trained, outputs(pipeline.unet, theirs), strict=True):
            difference, effect = (float((ours - other).abs().max() / ours.abs().max()) for other in (read, plain))
            print(f"{name}, rsLoRA {use_rslora}: {difference:.1e} off, of an effect of {effect:.2f}")
            assert difference < 2e-6
            assert effect > 0.05
        pipeline.unload_lora_weights()
