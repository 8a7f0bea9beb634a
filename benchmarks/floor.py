"""The floor: a bare training loop with peft and diffusers' modules, which reads nothing back and reports nothing."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager, nullcontext
from pathlib import Path
from typing import Any

import torch
from torch import nn
from torch.nn.functional import mse_loss

from .scene import CLASS, LEARNING_RATE, TRIGGER, Scene

TARGETS = ["to_q", "to_k", "to_v", "to_out.0"]
DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}


def add_lora(unet: nn.Module, rank: int) -> list[nn.Parameter]:
    """A LoRA in float32 on all attention layers of a frozen network; returns its parameters."""
    from peft import LoraConfig, inject_adapter_in_model

    inject_adapter_in_model(LoraConfig(r=rank, lora_alpha=rank, target_modules=TARGETS), unet)
    parameters = [parameter for parameter in unet.parameters() if parameter.requires_grad]
    for parameter in parameters:
        parameter.data = parameter.data.float()
    return parameters


def bare_step(
    unet: nn.Module,
    parameters: Sequence[nn.Parameter],
    latents: torch.Tensor,
    prompts: torch.Tensor,
    scheduler: Any,
    has_class: bool,
    precision: str = "fp32",
    learning_rate: float = LEARNING_RATE,
) -> Callable[[], None]:
    """One step, to be called again and again; as diffusers' DreamBooth script, without its data loader and reports.

    Args:
        latents: [b, 4, h, w] on the device; of the class in their second half, if *has_class*.
        prompts: [b, tokens, width].
    """
    optimizer = torch.optim.AdamW(parameters, lr=learning_rate, fused=True)
    scaler = torch.amp.GradScaler(latents.device.type) if precision == "fp16" else None
    prompts, dtype = prompts.to(DTYPES[precision]), DTYPES[precision]

    def autocast() -> AbstractContextManager[Any]:
        if precision == "fp32":
            return nullcontext()
        return torch.autocast(latents.device.type, DTYPES[precision])

    def step() -> None:
        noise = torch.randn_like(latents)
        times = torch.randint(0, 1000, (len(latents),), device=latents.device)
        noisy = scheduler.add_noise(latents, noise, times).to(dtype)
        with autocast():
            prediction = unet(noisy, times, prompts).sample.float()
        if has_class:
            photos, others = (mse_loss(*pair) for pair in zip(prediction.chunk(2), noise.chunk(2), strict=True))
            loss = photos + 1.0 * others
        else:
            loss = mse_loss(prediction, noise)
        (scaler.scale(loss) if scaler else loss).backward()
        if scaler:
            scaler.unscale_(optimizer)
        torch.nn.utils.clip_grad_norm_(parameters, 1.0)
        if scaler:
            scaler.step(optimizer)
            scaler.update()
        else:
            optimizer.step()
        optimizer.zero_grad()

    return step


def train(scene: Scene, has_class: bool, steps: int, output: Path, part: Callable[[str], Any]) -> None:
    """The whole job: read the base, encode, train, write the LoRA.

    Args:
        part: of the recorder, as a context manager.
    """
    from diffusers import AutoencoderKL, DDPMScheduler, UNet2DConditionModel
    from safetensors.torch import save_file
    from transformers import CLIPTextModel, CLIPTokenizer

    device, dtype = torch.device(scene.device), DTYPES[scene.precision]
    with part("base"):
        unet = UNet2DConditionModel.from_pretrained(scene.base, subfolder="unet", torch_dtype=dtype)
        vae = AutoencoderKL.from_pretrained(scene.base, subfolder="vae")
        text = CLIPTextModel.from_pretrained(scene.base, subfolder="text_encoder", dtype=torch.float32)
        unet.requires_grad_(False).to(device).train()
        scheduler = DDPMScheduler.from_pretrained(scene.base, subfolder="scheduler")
    with part("encoding"), torch.no_grad():
        tokenizer = CLIPTokenizer.from_pretrained(scene.base, subfolder="tokenizer")
        texts = [f"a photo of {TRIGGER}"] * scene.batch + [f"a photo of a {CLASS}"] * scene.batch * has_class
        tokens = tokenizer(texts, padding="max_length", max_length=77, return_tensors="pt").input_ids
        prompts = text.to(device)(tokens.to(device))[0]
        folders = [scene.photo_folder, scene.class_folder][: 1 + has_class]
        latents = torch.cat([_latents(vae.to(device), folder, scene) for folder in folders])
    del text, vae
    step = bare_step(unet, add_lora(unet, scene.rank), latents, prompts, scheduler, has_class, scene.precision)
    for _ in range(steps):
        step()
    output.mkdir(parents=True, exist_ok=True)
    trained = {name: tensor.detach() for name, tensor in unet.named_parameters() if tensor.requires_grad}
    save_file(trained, output / "lora.safetensors")


def _latents(vae: Any, folder: Path, scene: Scene) -> torch.Tensor:
    """The first photos, one batch of them: what is trained on does not matter here."""
    import numpy as np
    from PIL import Image

    pictures = []
    for path in sorted(folder.glob("*.png"))[: scene.batch]:
        with Image.open(path) as photo:
            pixels = np.asarray(photo.convert("RGB").resize((scene.resolution, scene.resolution)))
        pictures.append(torch.from_numpy(pixels.copy()).permute(2, 0, 1) / 127.5 - 1)
    images = torch.stack(pictures).to(next(vae.parameters()).device)
    return torch.cat([vae.encode(image[None]).latent_dist.mode() * 0.18215 for image in images])
