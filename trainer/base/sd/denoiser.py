"""The denoiser of Stable Diffusion (1.x, 2.x, SDXL): a diffusers UNet."""

from __future__ import annotations

from collections.abc import Callable, Generator, Mapping, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING, Any

import torch
from torch import nn

from ...machine.attention import use_attention
from ..conditioning import Conditioning
from ..denoiser import frozen_bytes
from ..times import LOGIT_NORMAL, spread
from .counting import checkpointed_blocks, countable
from .families import native_resolution
from .layout import LORA_PREFIX, LdmLayout
from .sample import sample
from .schedule import min_snr_weights, prediction_target, predicts_v
from .target_layers import target_layers
from .unet import LATENT_FACTOR, build_unet, outline_unet, predict

if TYPE_CHECKING:
    from diffusers import DDPMScheduler


@dataclass(frozen=True)
class DiffusersUNet:
    """See :class:`trainer.base.denoiser.Denoiser`.

    Attributes:
        layout: layout of the weights.
        noise_scheduler: the model's noise schedule and prediction type.
        weights: returns the weights, in the LDM layout.
        is_logit_normal, shift: of the timesteps in training, see :func:`trainer.base.times.spread`.
    """

    layout: LdmLayout
    noise_scheduler: DDPMScheduler = field(repr=False)
    weights: Callable[[], Mapping[str, torch.Tensor]] = field(repr=False)
    is_logit_normal: bool = field(default=False, kw_only=True)
    shift: float | None = field(default=None, kw_only=True)

    latent_channels = 4
    guidance_scale = 7.0
    latent_factor = LATENT_FACTOR

    @property
    def native_resolution(self) -> int:
        """The family's default for this prediction type."""
        return native_resolution(self.layout.family, str(self.noise_scheduler.config["prediction_type"]))

    @property
    def metadata(self) -> Mapping[str, str]:
        """kohya's base version and ModelSpec's architecture, from which other tools identify the family."""
        family, v = self.layout.family, predicts_v(self.noise_scheduler)
        return {
            "ss_base_model_version": family.kohya_base_model_version[v],
            "ss_v2": str(family.kohya_v2),
            "modelspec.architecture": f"{family.modelspec_architecture[v]}/lora",
            "modelspec.prediction_type": "v" if v else "epsilon",
        }

    def latent_size(self, width: int, height: int) -> tuple[int, int, int]:
        """(4, h/8, w/8)."""
        return self.latent_channels, height // LATENT_FACTOR, width // LATENT_FACTOR

    def build(self, dtype: torch.dtype) -> nn.Module:
        """See :func:`trainer.base.sd.unet.build_unet`."""
        return build_unet(self.layout, self.weights, dtype)

    def release(self, network: nn.Module) -> None:
        """Nothing to do: the network is a copy."""

    def outline(self) -> nn.Module | None:
        """See :func:`trainer.base.sd.unet.outline_unet`; takes seconds for SDXL."""
        return outline_unet(self.layout)

    def adapter_layers(self, network: nn.Module, lora_targets: str) -> dict[str, nn.Module]:
        """See :func:`trainer.base.sd.target_layers.target_layers`."""
        return target_layers(network, lora_targets)

    def file_key(self, layer: str) -> str:
        """kohya's key, from diffusers' layer names (SD 1.x and 2.x) or those of single files (SDXL)."""
        return f"{LORA_PREFIX}_{self.layout.file_layer(layer)}".replace(".", "_")

    can_offload = False

    def base_bytes(self, network: nn.Module) -> int:
        """Of the UNet."""
        return frozen_bytes(network)

    def make_room(self, network: nn.Module, needed: int) -> None:
        """Nothing to do: all of it is on the device."""

    def enable_gradient_checkpointing(self, network: nn.Module) -> None:
        """With diffusers' implementation."""
        network.enable_gradient_checkpointing()  # type: ignore[operator]

    def use_attention(self, network: nn.Module, attention: str) -> tuple[str, str]:
        """See :func:`trainer.machine.attention.use_attention`."""
        return use_attention(network, attention)

    def with_times(self, sampling: str, shift: float) -> DiffusersUNet:
        """Uniform unless logit-normal is asked for."""
        return replace(self, is_logit_normal=sampling == LOGIT_NORMAL, shift=shift or None)

    def times(self, uniform: torch.Tensor) -> torch.Tensor:
        """Timesteps, int64."""
        length = len(self.noise_scheduler.alphas_cumprod)
        return (spread(uniform, self.is_logit_normal, self.shift) * length).long().clamp(max=length - 1)

    def noisy_latents(self, latents: torch.Tensor, noise: torch.Tensor, times: torch.Tensor) -> torch.Tensor:
        """``sqrt(a) x + sqrt(1 - a) noise``, with ``a`` = ``alphas_cumprod``."""
        return self.noise_scheduler.add_noise(latents, noise, times)  # type: ignore[arg-type]

    def target(self, latents: torch.Tensor, noise: torch.Tensor, times: torch.Tensor) -> torch.Tensor:
        """See :func:`trainer.base.sd.schedule.prediction_target`."""
        return prediction_target(self.noise_scheduler, latents, noise, times)

    def loss_weights(self, times: torch.Tensor, snr_gamma: float) -> torch.Tensor | None:
        """See :func:`trainer.base.sd.schedule.min_snr_weights`."""
        return min_snr_weights(self.noise_scheduler, times, snr_gamma) if snr_gamma else None

    def predict(
        self, network: Any, noisy_latents: torch.Tensor, times: torch.Tensor, conditioning: Conditioning
    ) -> torch.Tensor:
        """Predict epsilon or v; see :func:`trainer.base.sd.unet.predict`."""
        return predict(network, noisy_latents, times, conditioning)

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
        """Sample with DDIM; see :func:`trainer.base.sd.sample.sample`."""
        return sample(network, self.noise_scheduler, prompts, negative, size, steps, guidance_scale, seeds, device)

    def blocks(self, network: nn.Module) -> list[nn.Module]:
        """The residual and transformer blocks."""
        return checkpointed_blocks(network)

    def countable(self, network: nn.Module, is_checkpointed: bool = False) -> AbstractContextManager[nn.Module]:
        """See :func:`trainer.base.sd.counting.countable`; never recomputes its :meth:`blocks`."""
        return countable(network)
