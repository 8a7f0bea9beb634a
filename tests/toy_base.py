"""A base of two linear layers under flow matching (arXiv 2209.03003), whose arithmetic a test can do by hand."""

from __future__ import annotations

import contextlib
from collections.abc import Generator, Mapping, Sequence
from contextlib import AbstractContextManager
from typing import Any

import torch
from torch import nn

from subjectbooth.tests.small_base import HashedPrompts
from subjectbooth.trainer.base.base_model import BaseModel
from subjectbooth.trainer.base.conditioning import Conditioning, encoded_text
from subjectbooth.trainer.base.denoiser import Denoiser, frozen_bytes

CHANNELS, FACTOR = 3, 4


class TwoLayers(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.first, self.second = nn.Linear(CHANNELS + 1 + 16, 16), nn.Linear(16, CHANNELS)

    def forward(self, latents: torch.Tensor, times: torch.Tensor, context: torch.Tensor) -> torch.Tensor:
        pixels = latents.permute(0, 2, 3, 1)
        more = torch.cat([times.to(pixels.dtype)[:, None], context.mean(dim=1)], dim=1)
        inputs = torch.cat([pixels, more[:, None, None].expand(*pixels.shape[:3], -1)], dim=-1)
        return self.second(torch.tanh(self.first(inputs))).permute(0, 3, 1, 2)


class Flow:
    """Noise at time 1, the picture at time 0; the network predicts the velocity between them."""

    latent_channels, latent_factor, native_resolution, guidance_scale = CHANNELS, FACTOR, 64, 1.0
    metadata: Mapping[str, str] = {"ss_base_model_version": "toy", "modelspec.architecture": "toy/lora"}

    def latent_size(self, width: int, height: int) -> tuple[int, int, int]:
        return CHANNELS, height // FACTOR, width // FACTOR

    def build(self, dtype: torch.dtype) -> nn.Module:
        with torch.random.fork_rng():
            torch.manual_seed(3)
            return TwoLayers().to(dtype).requires_grad_(False).eval()

    def release(self, network: nn.Module) -> None:
        pass

    def outline(self) -> nn.Module | None:
        with torch.device("meta"):
            return TwoLayers()

    def adapter_layers(self, network: nn.Module, lora_targets: str) -> dict[str, nn.Module]:
        return {name: layer for name, layer in network.named_modules() if isinstance(layer, nn.Linear)}

    def file_key(self, layer: str) -> str:
        return f"lora_unet_toy_{layer}"

    def enable_gradient_checkpointing(self, network: nn.Module) -> None:
        raise AssertionError("there is memory enough for two layers")

    def use_attention(self, network: nn.Module, attention: str) -> tuple[str, str]:
        return attention, ""

    def with_times(self, sampling: str, shift: float) -> Flow:
        raise AssertionError("uniform times are what it has")

    def times(self, uniform: torch.Tensor) -> torch.Tensor:
        return uniform.float()

    def noisy_latents(self, latents: torch.Tensor, noise: torch.Tensor, times: torch.Tensor) -> torch.Tensor:
        t = times[:, None, None, None]
        return (1 - t) * latents + t * noise

    def target(self, latents: torch.Tensor, noise: torch.Tensor, times: torch.Tensor) -> torch.Tensor:
        return noise - latents

    def loss_weights(self, times: torch.Tensor, snr_gamma: float) -> torch.Tensor | None:
        return None

    def predict(
        self, network: Any, noisy_latents: torch.Tensor, times: torch.Tensor, conditioning: Conditioning
    ) -> torch.Tensor:
        return network(noisy_latents, times, encoded_text(conditioning).hidden_states).float()

    def sample(
        self,
        network: Any,
        prompts: Conditioning,
        negative: Conditioning,
        size: tuple[int, ...],
        steps: int,
        guidance_scale: float,
        seeds: Sequence[int],
        device: torch.device,
    ) -> Generator[int, None, torch.Tensor]:
        latents = torch.cat([torch.randn(1, *size, generator=torch.Generator().manual_seed(seed)) for seed in seeds])
        for step in range(steps):
            times = torch.full((len(seeds),), 1 - step / steps)
            with torch.no_grad():
                latents = latents - network(latents, times, encoded_text(prompts).hidden_states) / steps
            yield step + 1
        return latents

    def blocks(self, network: nn.Module) -> list[nn.Module]:
        return []

    can_offload = False

    def base_bytes(self, network: nn.Module) -> int:
        return frozen_bytes(network)

    def make_room(self, network: nn.Module, needed: int) -> None:
        pass

    def countable(self, network: nn.Module, is_checkpointed: bool = False) -> AbstractContextManager[nn.Module]:
        return contextlib.nullcontext(network)


class Codec:
    def encode(self, images: torch.Tensor) -> torch.Tensor:
        return torch.nn.functional.avg_pool2d(images * 2 - 1, FACTOR)

    def decode(self, latents: torch.Tensor) -> torch.Tensor:
        return torch.nn.functional.interpolate(latents / 2 + 0.5, scale_factor=FACTOR).clamp(0, 1)


def toy_base() -> BaseModel:
    denoiser: Denoiser = Flow()
    return BaseModel("Toy", denoiser, HashedPrompts(), Codec(), "toy digest")
