"""Draws the pictures of an evaluation with the trainer's own sampler, for a base from disk."""

from __future__ import annotations

from collections.abc import Callable, Generator, Mapping, Sequence

import torch
from torch import nn

from ..base.base_model import BaseModel
from ..base.conditioning import Conditioning, concatenate
from ..base.finite import check_prompts
from ..errors import SubjectBoothError
from ..learn.loaded_lora import LoadedLora, layers_of_file
from ..machine.numerics import DTYPES, default_numerics
from ..machine.out_of_memory import free_bytes, memory_errors
from ..memory.drawing import Drawing, draw_all, pictures_at_once
from ..memory.plan import FreeMemory

_TEXT_PREFIX = "lora_te"


class Drawer:
    """See :data:`trainer.measure.evaluation.Draw`. Everything that can fail early is checked when it is created.

    Args:
        base: the base.
        lora: tensors of a LoRA under kohya's keys; layers of text encoders take effect too.
        where: the LoRA's file name, for messages.
        prompts: all prompts that will be drawn; they are encoded before the network takes memory.
        resolution: side of the pictures in pixels.
        steps: denoising steps.
        guidance_scale: classifier-free guidance.
        device: where to draw.
        precision: of the network: fp32, fp16 or bf16.
        free: bytes free on a device.

    Raises:
        SubjectBoothError: the LoRA does not fit the base.
    """

    def __init__(
        self,
        base: BaseModel,
        lora: Mapping[str, torch.Tensor],
        where: str,
        prompts: Sequence[str],
        resolution: int,
        steps: int,
        guidance_scale: float,
        device: torch.device,
        precision: str = "fp32",
        free: FreeMemory = free_bytes,
    ) -> None:
        self._base, self._device, self._free = base, device, free
        self._steps, self._guidance_scale = steps, guidance_scale
        self._size = base.denoiser.latent_size(resolution, resolution)
        self._dtype = DTYPES[precision]
        with default_numerics(device):
            self._lora = LoadedLora(layers_of_file(lora, where), where)
            text = self._text_encoders()
            outline = base.denoiser.outline()
            if outline is not None:
                self._lora.put_on(outline, self._network_keys)
                self._lora.check_used()
            self._encoded = self._encode([*prompts, ""], text)
            self._network = base.denoiser.build(self._dtype).to(device)
            self._lora.put_on(self._network, self._network_keys)
            self._lora.check_used()

    def __call__(self, prompt: str, seeds: Sequence[int], with_lora: bool) -> torch.Tensor:
        """Draw a prompt once per seed: float32 [seeds, 3, h, w] in 0..1, on the CPU."""
        denoiser, device = self._base.denoiser, self._device
        encoded, negative = self._encoded[with_lora][prompt], self._encoded[with_lora][""]
        self._lora.is_on = with_lora
        with (
            default_numerics(device),
            memory_errors(
                f"too little memory on {device} for a picture of the evaluation",
                "a smaller picture",
                "lower the resolution, or close other programs",
                "evaluation",
            ),
        ):
            longest = concatenate([encoded, negative]).first
            at_once = pictures_at_once(
                denoiser, self._network, longest, self._size, self._dtype, len(seeds), device, self._free(device)
            )

            def draw(first: int, last: int) -> Generator[int, None, torch.Tensor]:
                return denoiser.sample(
                    self._network, encoded, negative, self._size, self._steps, self._guidance_scale,
                    seeds[first:last], device,
                )  # fmt: skip

            drawing = Drawing(draw_all(draw, len(seeds), at_once, self._steps, device))
            for _ in drawing:
                pass
            return self._base.codec.decode(drawing.latents)

    def _text_encoders(self) -> dict[str, nn.Module]:
        """The text encoders with the LoRA; empty if it has no layers of theirs."""
        if not any(key.startswith(_TEXT_PREFIX) for key in self._lora.layers):
            return {}
        text = self._base.text
        if text is None:
            raise SubjectBoothError(
                "the LoRA contains layers of a text encoder",
                "a base whose text encoders can be changed",
                "choose another base or LoRA",
                self._lora.where,
            )
        models = text.build(torch.float32)
        for prefix, model in models.items():
            self._lora.put_on(model, _text_keys(prefix, text.file_key))
        return models

    def _network_keys(self, layer: str) -> list[str]:
        """kohya's key, and the one with diffusers' layer name, which differs for SDXL."""
        alias = f"lora_unet_{layer}".replace(".", "_")
        try:
            return [self._base.denoiser.file_key(layer), alias]
        except KeyError:  # no layer of a LoRA
            return [alias]

    def _encode(self, prompts: Sequence[str], models: Mapping[str, nn.Module]) -> dict[bool, dict[str, Conditioning]]:
        """The encoded prompts, without and with the LoRA."""
        unique = list(dict.fromkeys(prompts))
        without = self._base.prompts.encode(unique)
        check_prompts(dict(zip(unique, without, strict=True)))
        with_lora = without
        if models:
            text = self._base.text
            assert text is not None
            self._lora.is_on = True
            on_device = [model.to(self._device).eval() for model in models.values()]
            with torch.no_grad():
                tokens = [text.tokenize(prompt) for prompt in unique]
                with_lora = [encoded.to(torch.device("cpu")) for encoded in text.encode(on_device, tokens)]
        return {on: dict(zip(unique, encoded, strict=True)) for on, encoded in ((False, without), (True, with_lora))}


def _text_keys(prefix: str, file_key: Callable[[str, str], str]) -> Callable[[str], list[str]]:
    """A text encoder's keys; diffusers' files of SD 1.x and 2.x are renamed to ``lora_te1``."""

    def keys(layer: str) -> list[str]:
        key = file_key(prefix, layer)
        return [key, key.replace(f"{prefix}_", "lora_te1_", 1)] if prefix == "lora_te" else [key]

    return keys
