"""A LoRA file on a base draws what the training that made it draws."""

from __future__ import annotations

import dataclasses
from functools import cache
from typing import Any

import pytest
import torch

from subjectbooth.tests.small_base import small_base
from subjectbooth.trainer.config import TrainConfig
from subjectbooth.trainer.errors import SubjectBoothError
from subjectbooth.trainer.events import Validation
from subjectbooth.trainer.learn.data import TrainingData
from subjectbooth.trainer.learn.loop import Training
from subjectbooth.trainer.learn.viewer import VALIDATION_SEED
from subjectbooth.trainer.measure.drawer import Drawer
from subjectbooth.trainer.preserve.none import NoPreservation

CPU = torch.device("cpu")
PROMPT = "a photo of ohwx dog"
STEPS, SCALE = 4, 3.0
BASE = small_base()


@cache
def trained(**settings: Any) -> tuple[dict[str, torch.Tensor], torch.Tensor]:
    """A LoRA file, and the last validation image of its training, float32 [1, 3, 64, 64]."""
    config = TrainConfig(
        steps=3,
        resolution=64,
        rank=4,
        learning_rate=0.02,
        lora_targets="all",
        validation_interval=3,
        validation_prompts=(PROMPT,),
        validation_steps=STEPS,
        validation_guidance_scale=SCALE,
        **settings,
    )
    latents = torch.randn(2, 4, 8, 8, generator=torch.Generator().manual_seed(0))
    prompts = [PROMPT, ""]
    encoded = dict(zip(prompts, BASE.prompts.encode(prompts), strict=True))
    data = TrainingData(latents, (PROMPT,) * 2, encoded, NoPreservation(), square=(4, 8, 8))
    with Training(BASE, data, config, (PROMPT,), device=CPU) as training:
        (image,) = [event.images for event in training.events() if isinstance(event, Validation)]
        return training.lora(), image.permute(0, 3, 1, 2)


def drawer(lora: dict[str, torch.Tensor], base: Any = BASE) -> Drawer:
    return Drawer(base, lora, "dog.safetensors", [PROMPT], 64, STEPS, SCALE, CPU)


@pytest.mark.parametrize(
    "settings",
    [
        {"network_alpha": 2.0},
        {"network_alpha": 8.0, "use_rslora": True},
        {"network_alpha": 4.0, "train_text_encoder": True, "text_encoder_lr": 0.02},
    ],
)
def test_the_file_draws_what_its_training_draws(settings: dict[str, Any]) -> None:
    lora, expected = trained(**settings)
    assert any(key.startswith("lora_te") for key in lora) == ("train_text_encoder" in settings)
    draw = drawer(lora)
    without = draw(PROMPT, [VALIDATION_SEED], False)
    made = draw(PROMPT, [VALIDATION_SEED], True)
    torch.testing.assert_close(made, expected, rtol=0, atol=1e-4)
    assert (made - without).abs().max() > 0.01
    assert torch.equal(draw(PROMPT, [VALIDATION_SEED], False), without), "switching it on leaves nothing behind"


def test_layers_of_text_encoders_take_effect() -> None:
    """With the network's layers left out, only the prompt's encoding changes."""
    lora, _ = trained(train_text_encoder=True, text_encoder_lr=0.02)
    text = {key: tensor for key, tensor in lora.items() if key.startswith("lora_te_")}
    silent = {key: torch.zeros_like(tensor) if ".lora_up." in key else tensor for key, tensor in text.items()}
    trained_text, untrained = (drawer(tensors)(PROMPT, [1], True) for tensors in (text, silent))
    assert (trained_text - untrained).abs().max() > 1e-3
    renamed = {key.replace("lora_te_", "lora_te1_", 1): tensor for key, tensor in text.items()}
    assert torch.equal(drawer(renamed)(PROMPT, [1], True), trained_text), "as in a file of diffusers"


def test_each_picture_has_its_own_seed() -> None:
    lora, _ = trained()
    both = drawer(lora)(PROMPT, [1, 2], True)
    assert both.shape == (2, 3, 64, 64) and not torch.equal(both[0], both[1])
    torch.testing.assert_close(drawer(lora)(PROMPT, [2], True)[0], both[1])


def test_a_lora_that_does_not_fit_is_rejected() -> None:
    lora, _ = trained()
    key = next(name for name in lora if name.endswith(".lora_down.weight"))
    layer = key.removesuffix(".lora_down.weight")
    without_up = {name: tensor for name, tensor in lora.items() if name != f"{layer}.lora_up.weight"}
    for changed, problem in (
        ({**lora, "lora_unet_elsewhere.lora_down.weight": torch.ones(4, 8), "lora_unet_elsewhere.lora_up.weight":
          torch.ones(8, 4)}, r"1 of the LoRA's \d+ layers are not in the base, such as 'lora_unet_elsewhere'"),
        ({**lora, key: torch.ones(4, 7)}, "of shape"),
        ({**lora, f"{layer}.dora_scale": torch.ones(4)}, "not part of a plain LoRA"),
        (without_up, "is incomplete"),
    ):  # fmt: skip
        with pytest.raises(SubjectBoothError, match=problem) as raised:
            drawer(changed)
        assert raised.value.where == "dog.safetensors"
    text, _ = trained(train_text_encoder=True)
    with pytest.raises(SubjectBoothError, match="layers of a text encoder"):
        drawer(text, dataclasses.replace(BASE, text=None))
