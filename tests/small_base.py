"""A base model of a few thousand weights for tests of the trainer's arithmetic.

The UNet is a real diffusers one. Prompts and images are encoded by simple functions instead of a text encoder and a
VAE; those are tested inside ComfyUI.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Sequence
from pathlib import Path

import numpy as np
import torch

from subjectbooth.trainer.base.base_model import BaseModel
from subjectbooth.trainer.base.conditioning import Conditioning, EncodedText
from subjectbooth.trainer.base.sd.clip_text import ClipText
from subjectbooth.trainer.base.sd.denoiser import DiffusersUNet
from subjectbooth.trainer.base.sd.families import SD1, TextEncoderShape
from subjectbooth.trainer.base.sd.layout import LdmLayout
from subjectbooth.trainer.base.sd.schedule import make_noise_scheduler
from subjectbooth.trainer.base.sd.target_layers import target_layers
from subjectbooth.trainer.base.sd.text_encoder import build_text_encoder
from subjectbooth.trainer.base.stored.stored_base import token_chunks
from subjectbooth.trainer.config import TrainConfig
from subjectbooth.trainer.learn import adapter
from subjectbooth.trainer.preserve.class_images import ClassImages
from subjectbooth.trainer.preserve.priors import ClassPriors
from subjectbooth.trainer.subject.photo import Photo
from subjectbooth.trainer.subject.subject import Subject


def alphas_cumprod() -> torch.Tensor:
    """Stable Diffusion's noise schedule, by its definition: the square roots of the betas are linear."""
    return torch.cumprod(1 - torch.linspace(0.00085**0.5, 0.012**0.5, 1000) ** 2, dim=0)


def small_unet(seed: int = 0) -> torch.nn.Module:
    from diffusers import UNet2DConditionModel

    with torch.random.fork_rng():
        torch.manual_seed(seed)
        unet = UNet2DConditionModel(
            block_out_channels=(32, 64),
            layers_per_block=1,
            cross_attention_dim=16,
            attention_head_dim=4,
            down_block_types=("CrossAttnDownBlock2D", "DownBlock2D"),
            up_block_types=("UpBlock2D", "CrossAttnUpBlock2D"),
            norm_num_groups=8,
        )
    return unet.requires_grad_(False).eval()


FAMILY = dataclasses.replace(
    SD1,
    context_dim=16,
    text_encoders=(
        TextEncoderShape(
            name="l",
            width=16,
            layers=2,
            heads=2,
            activation="quick_gelu",
            padding=49407,
            layer=-1,
            norms_hidden_layer=True,
            projects=False,
            prefix="lora_te",
            single_file="",
            open_clip=False,
        ),
    ),
)


def small_text_encoder(dtype: torch.dtype = torch.float32) -> torch.nn.Module:
    """CLIP's layout, 16 wide, with random weights large enough that every layer matters."""
    from transformers import CLIPTextConfig, CLIPTextModel

    shape = FAMILY.text_encoders[0]
    with torch.random.fork_rng():
        torch.manual_seed(3)
        model = CLIPTextModel(
            CLIPTextConfig(
                hidden_size=16,
                intermediate_size=64,
                num_hidden_layers=2,
                num_attention_heads=2,
                vocab_size=49408,
                projection_dim=16,
            )
        )
        weights = {name: torch.randn(tensor.shape) * 0.3 for name, tensor in model.state_dict().items()}
    return build_text_encoder(weights, shape, dtype, "test")


class HashedPrompts:
    def encode(self, prompts: Sequence[str]) -> list[Conditioning]:
        encoded = []
        for prompt in prompts:
            generator = torch.Generator().manual_seed(sum(prompt.encode()))
            encoded.append(EncodedText(torch.randn(1, 77, 16, generator=generator)))
        return encoded


class PoolingCodec:
    def encode(self, images: torch.Tensor) -> torch.Tensor:
        pooled = torch.nn.functional.avg_pool2d(images * 2 - 1, 8)
        return torch.cat([pooled, pooled.mean(1, keepdim=True)], dim=1)

    def decode(self, latents: torch.Tensor) -> torch.Tensor:
        return torch.nn.functional.interpolate(latents[:, :3] / 2 + 0.5, scale_factor=8).clamp(0, 1)


def small_base(prediction_type: str = "epsilon", seed: int = 0) -> BaseModel:
    return BaseModel(
        family=FAMILY.name,
        denoiser=small_denoiser(prediction_type, seed),
        prompts=HashedPrompts(),
        codec=PoolingCodec(),
        digest=f"small {prediction_type} {seed}",
        text=ClipText(
            FAMILY, None, lambda prompt: token_chunks(prompt, FAMILY), lambda dtype: [small_text_encoder(dtype)]
        ),
    )


def small_denoiser(prediction_type: str = "epsilon", seed: int = 0) -> MadeUNet:
    return MadeUNet(
        LdmLayout(FAMILY, {}, {}, {}, "test"),
        make_noise_scheduler(alphas_cumprod(), prediction_type),
        dict,
        lambda dtype: torch.nn.Module.to(small_unet(seed), dtype),
    )


def with_lora(unet: torch.nn.Module, config: TrainConfig) -> list[torch.nn.Parameter]:
    """Inject a LoRA with these settings into a diffusers UNet; returns the trainable parameters."""
    return adapter.inject(unet, config, target_layers(unet, config.lora_targets))


@dataclasses.dataclass(frozen=True)
class MadeUNet(DiffusersUNet):
    """The trainer's denoiser, with its network built by a function."""

    make: Callable[[torch.dtype], torch.nn.Module]

    def build(self, dtype: torch.dtype) -> torch.nn.Module:
        return self.make(dtype)

    def outline(self) -> None:
        return None


def with_network(base: BaseModel, make: Callable[[torch.dtype], torch.nn.Module]) -> BaseModel:
    """The same base, with its network built by ``make``."""
    found = base.denoiser
    assert isinstance(found, DiffusersUNet)
    denoiser = MadeUNet(found.layout, found.noise_scheduler, found.weights, make)
    return dataclasses.replace(base, denoiser=denoiser)


def with_text_encoders(base: BaseModel, make: Callable[[torch.dtype], list[torch.nn.Module]]) -> BaseModel:
    """The same base, its text encoders made by that function."""
    assert isinstance(base.text, ClipText)
    return dataclasses.replace(base, text=dataclasses.replace(base.text, models=make))


def small_subject(count: int = 3, resolution: int = 64) -> Subject:
    random = np.random.default_rng(0)
    photos = tuple(
        Photo(random.integers(0, 255, (80, 80, 3), dtype=np.uint8), None, "a photo of ohwx dog", f"{number}.png")
        for number in range(count)
    )
    return Subject(photos, "ohwx", "dog", resolution, "center", "a photo of {token} {class}")


def small_priors(count: int = 4) -> ClassPriors:
    latents = torch.randn(count, 4, 8, 8, generator=torch.Generator().manual_seed(5))
    return ClassPriors(latents, "a photo of a dog", tuple(f"{number:064d}" for number in range(count)), "priors")


def small_class_images(count: int = 4) -> ClassImages:
    return ClassImages(small_priors(count))


def folder_bytes(path: Path) -> dict[str, bytes]:
    """The content of every file below ``path``, by relative name."""
    return {file.relative_to(path).as_posix(): file.read_bytes() for file in path.rglob("*") if file.is_file()}


def write_cat_photos(folder: Path) -> None:
    """Three photos of one cat, 96 x 96 pixels."""
    from PIL import Image
    from skimage import data

    folder.mkdir()
    for number in range(3):
        photo = Image.fromarray(data.chelsea()).crop((60 + 20 * number, 0, 260 + 20 * number, 200)).resize((96, 96))
        photo.save(folder / f"{number}.png")
