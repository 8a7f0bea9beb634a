"""What all contestants train on: one base, photos, class images and settings."""

from __future__ import annotations

import json
import shutil
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

SIZES: dict[str, dict[str, Any]] = {
    "tiny": {"levels": 1, "layers_per_block": 1},
    "small": {"levels": 2, "layers_per_block": 1},
    "sd1": {"levels": 4, "layers_per_block": 2},
}
"""Of the UNet: levels and residual blocks in each. ComfyUI recognises Stable Diffusion by its first width, 320, so that
smaller ones have fewer levels. The VAE and the text encoder are those of Stable Diffusion 1.5, whatever the size."""

TRIGGER, CLASS = "ohwx cat", "cat"
LEARNING_RATE = 1e-4


@dataclass(frozen=True)
class Scene:
    """The common settings of a benchmark.

    Attributes:
        folder: base, checkpoint, photos and class images.
        size: of the UNet, see :data:`SIZES`.
        resolution: pixels.
        rank: of the LoRA on all attention layers; alpha is the same.
        batch: photos per step; with class images, as many of these.
        precision: ``fp32``, ``bf16`` or ``fp16``.
        device: ``cpu`` or ``cuda``.
        threads: of torch, in each process; 0 for its own choice.
        photos, class_images: how many.
        warm_up, timed: steps before the measured ones, and these.
    """

    folder: Path
    size: str = "tiny"
    resolution: int = 128
    rank: int = 16
    batch: int = 1
    precision: str = "fp32"
    device: str = "cpu"
    threads: int = 0
    photos: int = 4
    class_images: int = 4
    warm_up: int = 2
    timed: int = 10

    @property
    def base(self) -> Path:
        """A diffusers pipeline."""
        return self.folder / f"base-{self.size}"

    @property
    def checkpoint(self) -> Path:
        """The same weights as one file."""
        return self.folder / f"base-{self.size}.safetensors"

    @property
    def photo_folder(self) -> Path:
        return self.folder / f"photos-{self.photos}"

    @property
    def class_folder(self) -> Path:
        """Pictures of the class, for contestants that read them from a folder."""
        return self.folder / f"class-{self.class_images}"

    def to_json(self) -> str:
        return json.dumps({**asdict(self), "folder": str(self.folder)})

    @classmethod
    def from_json(cls, text: str) -> Scene:
        values = json.loads(text)
        return cls(**{**values, "folder": Path(values["folder"])})


def build(scene: Scene) -> None:
    """Write what is missing of base, checkpoint, photos and class images."""
    from subjectbooth.scripts.full_size import PHOTOS

    scene.folder.mkdir(parents=True, exist_ok=True)
    _write_pictures(PHOTOS, scene.photo_folder, scene.photos)
    _write_pictures(PHOTOS, scene.class_folder, scene.class_images)
    if not scene.checkpoint.is_file():
        shutil.rmtree(scene.base, ignore_errors=True)
        _write_base(scene)


def _write_pictures(source: Path, folder: Path, count: int) -> None:
    """Crops of the same photos, no two alike."""
    from PIL import Image

    if folder.is_dir() and len(list(folder.iterdir())) == count:
        return
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir()
    photos = sorted(source.glob("*.png"))
    for number in range(count):
        with Image.open(photos[number % len(photos)]) as photo:
            cut = number // len(photos)
            left, top = cut % 16, cut // 16
            photo.crop((left, top, photo.width - 16 + left, photo.height - 16 + top)).save(folder / f"{number:04d}.png")


def _write_base(scene: Scene) -> None:
    """Stable Diffusion 1.5's layout with random weights, which affect neither time nor memory."""
    import torch
    from diffusers import DDIMScheduler, StableDiffusionPipeline
    from safetensors.torch import save_file
    from transformers import CLIPTokenizerFast

    from subjectbooth.benchmarks.memory import save_fingerprints
    from subjectbooth.scripts import full_size
    from subjectbooth.trainer.base.sd.ldm_unet import ldm_names
    from subjectbooth.trainer.base.sd.tokenizer import clip_tokenizer

    torch.manual_seed(0)
    unet, vae, text = full_size.unet("sd1", **unet_changes(scene.size)), full_size.vae(), full_size.text_encoder("l")
    scheduler = DDIMScheduler(
        beta_start=0.00085,
        beta_end=0.012,
        beta_schedule="scaled_linear",
        clip_sample=False,
        set_alpha_to_one=False,
        steps_offset=1,
    )
    StableDiffusionPipeline(
        unet=unet,
        vae=vae,
        text_encoder=text,
        tokenizer=CLIPTokenizerFast(tokenizer_object=clip_tokenizer(), model_max_length=77),
        scheduler=scheduler,
        safety_checker=None,
        feature_extractor=None,
        requires_safety_checker=False,
    ).save_pretrained(scene.base)
    save_fingerprints(unet.state_dict(), scene.base)
    names = ldm_names({name: tuple(tensor.shape) for name, tensor in unet.state_dict().items()})
    tensors = {f"model.diffusion_model.{names[name]}": tensor for name, tensor in unet.state_dict().items()}
    for name, tensor in text.state_dict().items():
        tensors[f"cond_stage_model.transformer.text_model.{name.removeprefix('text_model.')}"] = tensor
    tensors |= {f"first_stage_model.{name}": tensor for name, tensor in vae.state_dict().items()}
    save_file(tensors, scene.checkpoint)


def unet_changes(size: str) -> dict[str, Any]:
    """How the UNet's config differs from that of Stable Diffusion 1.5."""
    levels = SIZES[size]["levels"]
    if levels == 4:
        return {}
    return {
        "block_out_channels": tuple(320 * 2**level for level in range(levels)),
        "layers_per_block": SIZES[size]["layers_per_block"],
        "down_block_types": ("CrossAttnDownBlock2D",) * levels,
        "up_block_types": ("CrossAttnUpBlock2D",) * levels,
    }
