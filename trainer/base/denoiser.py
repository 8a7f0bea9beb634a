"""The network that is trained, of any architecture, and its noise process."""

from __future__ import annotations

from collections.abc import Generator, Mapping, Sequence
from contextlib import AbstractContextManager
from typing import Any, Protocol

import torch
from torch import nn

from .conditioning import Conditioning


class Denoiser(Protocol):
    """A trainable network with its noise process; the training loop needs nothing else of a model.

    It holds no weights: :meth:`build` creates the network when training starts, and the other methods take the network
    (which may be wrapped by accelerate, or on the meta device) as an argument. *Times* are the network's measure of
    noise: a timestep, a sigma, or the time of a flow.

    Attributes:
        latent_channels: number of channels of its latents.
        latent_factor: image pixels per latent pixel, along a side.
        native_resolution: side of the images it was trained on, in pixels.
        guidance_scale: classifier-free guidance that is usual for sampling with it.
        can_offload: whether frozen weights for which there is no room on the device can stay in system memory.
        metadata: the architecture, as LoRA files state it in kohya's and ModelSpec's keys.
    """

    latent_channels: int
    latent_factor: int
    can_offload: bool

    @property
    def native_resolution(self) -> int: ...

    @property
    def guidance_scale(self) -> float: ...

    @property
    def metadata(self) -> Mapping[str, str]: ...

    def latent_size(self, width: int, height: int) -> tuple[int, int, int]:
        """(channels, height, width) of the latents of an image of ``width`` x ``height`` pixels."""
        ...

    # The network

    def build(self, dtype: torch.dtype) -> nn.Module:
        """The frozen network on the CPU, in ``dtype``. Called once, when training or sampling starts; until then it
        takes no memory."""
        ...

    def release(self, network: nn.Module) -> None:
        """Called when nothing will use the network any more, also after an error."""
        ...

    def outline(self) -> nn.Module | None:
        """The network on the meta device, for cheap checks of its layers before training; None if not supported."""
        ...

    def adapter_layers(self, network: nn.Module, lora_targets: str) -> dict[str, nn.Module]:
        """The layers that get a LoRA, by module name.

        Args:
            lora_targets: as in :class:`trainer.config.TrainConfig`.

        Raises:
            SubjectBoothError: the network has no such layer.
        """
        ...

    def file_key(self, layer: str) -> str:
        """A layer's key in a LoRA file, without the suffix: ``lora_unet_..._to_q``."""
        ...

    def enable_gradient_checkpointing(self, network: nn.Module) -> None:
        """Keep only the inputs of blocks, and recompute the blocks in the backward pass."""
        ...

    def use_attention(self, network: nn.Module, attention: str) -> tuple[str, str]:
        """Switch the attention implementation (see :func:`trainer.machine.attention.choose_attention`).

        Returns:
            the implementation in use, and a note for the user if it is another one.
        """
        ...

    # Noise

    def with_times(self, sampling: str, shift: float) -> Denoiser:
        """The same network, trained at other times.

        Args:
            sampling, shift: ``timestep_sampling`` and ``timestep_shift`` of :class:`trainer.config.TrainConfig`.

        Raises:
            SubjectBoothError: the noise process has no such choice.
        """
        ...

    def times(self, uniform: torch.Tensor) -> torch.Tensor:
        """Map uniform random numbers to training times.

        Args:
            uniform: float64 [b] in [0, 1), on the CPU.
        """
        ...

    def noisy_latents(self, latents: torch.Tensor, noise: torch.Tensor, times: torch.Tensor) -> torch.Tensor:
        """The latents, float32 [b, c, h, w], noised to the given times."""
        ...

    def target(self, latents: torch.Tensor, noise: torch.Tensor, times: torch.Tensor) -> torch.Tensor:
        """The training target, shaped like ``latents``."""
        ...

    def loss_weights(self, times: torch.Tensor, snr_gamma: float) -> torch.Tensor | None:
        """A factor for each image's loss, float32 [b]; None if all are 1.

        Args:
            snr_gamma: gamma of min-SNR weighting (arXiv 2303.09556); 0 turns it off.
        """
        ...

    def predict(
        self, network: Any, noisy_latents: torch.Tensor, times: torch.Tensor, conditioning: Conditioning
    ) -> torch.Tensor:
        """The network's prediction, float32, shaped like ``noisy_latents``.

        Args:
            network: from :meth:`build`, possibly wrapped.
            noisy_latents: [b, c, h, w], scaled for the network.
            times: [b].
            conditioning: batch size b.
        """
        ...

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
        """Sample latents in one batch, with classifier-free guidance.

        Args:
            prompts: one per image, or one for all.
            negative: for all images, batch size 1.
            size: (channels, height, width).
            steps: denoising steps.
            seeds: seed of each image's initial noise.

        Yields:
            denoising steps done, 1..steps.

        Returns:
            latents, float32 [n, c, h, w], on the CPU, scaled for the network.
        """
        ...

    # Memory

    def base_bytes(self, network: nn.Module) -> int:
        """Bytes of the frozen weights, as the network uses them on the device."""
        ...

    def make_room(self, network: nn.Module, needed: int) -> None:
        """Called before the first step with the bytes that training takes on the device beside the base."""
        ...

    def blocks(self, network: nn.Module) -> list[nn.Module]:
        """The blocks that gradient checkpointing recomputes one by one, for counting each only once; their first
        argument is the hidden states. Empty if they have other arguments: then a whole step is counted."""
        ...

    def countable(self, network: nn.Module, is_checkpointed: bool = False) -> AbstractContextManager[nn.Module]:
        """Inside, the network runs on the meta device and allocates as much as on a real device; restored on exit.

        Args:
            is_checkpointed: whether it recomputes its blocks; only asked for if :meth:`blocks` is empty.

        Returns:
            the network to call, with all its weights as parameters.
        """
        ...


def frozen_bytes(network: nn.Module) -> int:
    """Bytes of a network's own parameters and buffers that are not trained."""
    return sum(tensor.nbytes for tensor in (*network.parameters(), *network.buffers()) if not tensor.requires_grad)
