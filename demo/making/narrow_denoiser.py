"""The narrow UNet as a denoiser for the trainer. Import it only where `trainer` is a top-level package."""

from __future__ import annotations

import copy
from collections.abc import Callable, Generator
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

from trainer.base.base_model import BaseModel
from trainer.base.conditioning import Conditioning, EncodedText, encoded_text
from trainer.base.sd.denoiser import DiffusersUNet
from trainer.base.sd.families import SD1
from trainer.base.sd.layout import LdmLayout
from trainer.base.sd.schedule import make_noise_scheduler

from .narrow import Narrow
from .schedule import alphas_cumprod
from .t_lora import masked
from .unet import UNet


class _CalledLikeDiffusers:
    """The narrow UNet under the arguments of diffusers' UNets, for the trainer's sampler.

    Args:
        unet: the network.
    """

    def __init__(self, unet: Any) -> None:
        self._unet = unet

    def __call__(
        self, latents: torch.Tensor, times: torch.Tensor, encoder_hidden_states: torch.Tensor, **_: Any
    ) -> Any:
        return (self._unet(latents, times, encoder_hidden_states),)

    def __getattr__(self, name: str) -> Any:
        return getattr(self._unet, name)


@dataclass(frozen=True)
class NarrowUNet(DiffusersUNet):
    """Stable Diffusion's noise around the narrow UNet.

    Attributes:
        unet: the base; every training gets a copy.
    """

    unet: UNet

    def build(self, dtype: torch.dtype) -> nn.Module:
        """A copy."""
        return copy.deepcopy(self.unet).to(dtype)

    def outline(self) -> None:
        """Not needed: it is small."""

    def use_attention(self, network: nn.Module, attention: str) -> tuple[str, str]:
        """Has no effect: the UNet has its own attention."""
        return attention, ""

    def predict(
        self, network: Any, noisy_latents: torch.Tensor, times: torch.Tensor, conditioning: Conditioning
    ) -> torch.Tensor:
        """The noise or v, float32 like ``noisy_latents``."""
        return network(noisy_latents, times, encoded_text(conditioning).hidden_states)

    def sample(self, network: Any, *others: Any) -> Generator[int, None, torch.Tensor]:
        """See :meth:`trainer.base.denoiser.Denoiser.sample`."""
        return super().sample(_CalledLikeDiffusers(network), *others)

    def blocks(self, network: nn.Module) -> list[nn.Module]:
        """None: gradient checkpointing is not supported."""
        return []

    def countable(self, network: nn.Module, is_checkpointed: bool = False) -> AbstractContextManager[nn.Module]:
        """It runs on the meta device as it is."""
        return nullcontext(network)


@dataclass(frozen=True)
class MaskedNarrowUNet(NarrowUNet):
    """Trains a T-LoRA."""

    def predict(
        self, network: Any, noisy_latents: torch.Tensor, times: torch.Tensor, conditioning: Conditioning
    ) -> torch.Tensor:
        """With the ranks of the times only."""
        with masked(network, times):
            return super().predict(network, noisy_latents, times, conditioning)


class NarrowPrompts:
    """The narrow text encoder. Words outside its vocabulary are left out; the wide one has zeros for them."""

    def __init__(self, encode: Callable[[list[str]], torch.Tensor]) -> None:
        self._encode = encode

    def encode(self, prompts: Any) -> list[Conditioning]:
        """See :class:`trainer.base.conditioning.PromptEncoder`."""
        with torch.no_grad():
            return [EncodedText(self._encode([prompt])) for prompt in prompts]


class NarrowCodec:
    """The narrow autoencoder, whose latents are the training space's."""

    def __init__(self, nets: Narrow) -> None:
        self._nets = nets

    def encode(self, images: torch.Tensor) -> torch.Tensor:
        """See :class:`trainer.base.conditioning.LatentCodec`."""
        with torch.no_grad():
            return self._nets.encoder(images)

    def decode(self, latents: torch.Tensor) -> torch.Tensor:
        """See :class:`trainer.base.conditioning.LatentCodec`."""
        with torch.no_grad():
            return self._nets.decoder(latents).clamp(0, 1)


def narrow_base(
    nets: Narrow,
    digest: str = "the narrow model",
    levels: torch.Tensor | None = None,
    prediction_type: str = "epsilon",
    t_lora: bool = False,
) -> BaseModel:
    """The nets as a base model.

    Args:
        digest: of the weights. Without one, use a separate folder for the runs of each base.
        levels: ``alphas_cumprod`` of the noise schedule, float32 [1000]; None for the demo base's.
        prediction_type: what the UNet predicts, ``epsilon`` or ``v_prediction``.
        t_lora: whether the LoRA is trained as a T-LoRA.
    """
    from .words import token_ids, word_ids

    scheduler = make_noise_scheduler(alphas_cumprod() if levels is None else levels, prediction_type)
    kind = MaskedNarrowUNet if t_lora else NarrowUNet
    denoiser = kind(LdmLayout(SD1, {}, {}, {}, "the narrow model"), scheduler, dict, nets.unet)

    def encode(captions: list[str]) -> torch.Tensor:
        known = [" ".join(word for word in text.split() if word in word_ids()) for text in captions]
        return nets.text(token_ids(known))

    prompts = NarrowPrompts(encode)
    return BaseModel(SD1.name, denoiser, prompts, NarrowCodec(nets), digest)
