"""What is trained on, whatever its architecture: a network and its noise."""

from __future__ import annotations

from collections.abc import Generator, Mapping, Sequence
from contextlib import AbstractContextManager
from typing import Any, Protocol

import torch
from torch import nn

from .conditioning import Conditioning


class Denoiser(Protocol):
    """A network that can be trained on, with its noise. The training knows no more of a model than this.

    The weights are not part of it: :meth:`build` makes the network when training starts, and everything else takes the
    network (perhaps wrapped by accelerate, or a stand-in without weights) as an argument. *Times* are whatever the
    network's noise is counted in: a timestep, a sigma, a time of a flow.

    Attributes:
        latent_channels: of its latents.
        latent_factor: pixels a side of one latent.
        native_resolution: pixels a side that it was trained at.
        metadata: what a LoRA file tells of the architecture, in the keys of kohya and of ModelSpec.
    """

    latent_channels: int
    latent_factor: int

    @property
    def native_resolution(self) -> int: ...

    @property
    def metadata(self) -> Mapping[str, str]: ...

    def latent_size(self, width: int, height: int) -> tuple[int, int, int]:
        """(channels, height, width) of the latents of a picture of so many pixels."""
        ...

    # The network

    def build(self, dtype: torch.dtype) -> nn.Module:
        """The network, frozen, on the CPU, its weights in ``dtype``. Called once, when training (or drawing) starts:
        before that the memory is the host's."""
        ...

    def outline(self) -> nn.Module | None:
        """The network on the meta device, to look at its layers early and cheaply; None where that cannot be had."""
        ...

    def adapter_layers(self, network: nn.Module, lora_targets: str) -> dict[str, nn.Module]:
        """The layers that get a LoRA, by the name of the module in the network.

        Args:
            lora_targets: as in :class:`trainer.config.TrainConfig`.

        Raises:
            SubjectBoothError: the network has none of them.
        """
        ...

    def file_key(self, layer: str) -> str:
        """What a LoRA file calls a layer, without what follows the last underscore group: ``lora_unet_..._to_q``."""
        ...

    def enable_gradient_checkpointing(self, network: nn.Module) -> None:
        """Compute blocks again in the backward pass and keep only what goes into them."""
        ...

    def use_attention(self, network: nn.Module, attention: str) -> tuple[str, str]:
        """Compute attention that way (see :func:`trainer.machine.attention.choose_attention`).

        Returns:
            what is used, and a sentence for the user where that is something else.
        """
        ...

    # Its noise

    def times(self, uniform: torch.Tensor) -> torch.Tensor:
        """Times to train at, for uniform draws.

        Args:
            uniform: float64 [b] in 0..1 (1 excluded), on the CPU.
        """
        ...

    def noisy_latents(self, latents: torch.Tensor, noise: torch.Tensor, times: torch.Tensor) -> torch.Tensor:
        """Latents float32 [b, c, h, w] with so much of the noise in them."""
        ...

    def target(self, latents: torch.Tensor, noise: torch.Tensor, times: torch.Tensor) -> torch.Tensor:
        """What the network should predict, like ``latents``."""
        ...

    def loss_weights(self, times: torch.Tensor, snr_gamma: float) -> torch.Tensor | None:
        """float32 [b], a factor for each picture's loss; None where all count the same.

        Args:
            snr_gamma: of min-SNR weighting (arXiv 2303.09556); 0 turns it off.
        """
        ...

    def predict(
        self, network: Any, noisy_latents: torch.Tensor, times: torch.Tensor, conditioning: Conditioning
    ) -> torch.Tensor:
        """The network's prediction, float32, like ``noisy_latents``.

        Args:
            network: from :meth:`build`, perhaps wrapped.
            noisy_latents: [b, c, h, w], in the training space.
            times: [b].
            conditioning: b prompts.
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
        """Draw pictures' latents together, with classifier-free guidance.

        Args:
            prompts: one a picture, or one for all.
            negative: for all, batch size 1.
            size: (channels, height, width).
            steps: denoising steps.
            seeds: of each picture's first noise.

        Yields:
            denoising steps done, 1..steps.

        Returns:
            latents, float32 [n, c, h, w], on the CPU, in the training space.
        """
        ...

    # How its memory is counted

    def blocks(self, network: nn.Module) -> list[nn.Module]:
        """The blocks that gradient checkpointing computes again, one at a time. Each takes the hidden states first."""
        ...

    def countable(self, network: nn.Module) -> AbstractContextManager[None]:
        """Inside, the network runs on the meta device and keeps as much memory as it does on a real one; afterwards it
        is as it was."""
        ...
