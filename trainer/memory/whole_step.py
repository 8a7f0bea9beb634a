"""Counts the memory of a training step by computing all of it on torch's meta device, forward and backward.

For networks whose blocks cannot be counted one at a time, as :mod:`trainer.memory.footprint` does: with any number of
inputs and outputs. Nothing about the network is assumed, and nothing is fitted; it takes as long as there are
operations, about two seconds for a large transformer.
"""

from __future__ import annotations

from contextlib import ExitStack
from typing import Any

import torch
from torch import nn

from ..base.conditioning import Conditioning
from ..base.denoiser import Denoiser
from .footprint import Footprint, Memory, inputs_on_meta, times_on_meta, weights_on_meta


def step_footprint(
    denoiser: Denoiser, network: nn.Module, conditioning: Conditioning, size: tuple[int, int], dtype: torch.dtype
) -> Footprint:
    """Count one image's activations; arguments as in :func:`trainer.memory.footprint.training_footprint`."""
    whole, checkpointed = (
        _peak(denoiser, network, conditioning, size, dtype, is_checkpointed) for is_checkpointed in (False, True)
    )
    return Footprint(whole, checkpointed)


def _peak(
    denoiser: Denoiser,
    network: nn.Module,
    conditioning: Conditioning,
    size: tuple[int, int],
    dtype: torch.dtype,
    is_checkpointed: bool,
) -> int:
    with torch.inference_mode(False), torch.enable_grad(), ExitStack() as undo:
        counted = undo.enter_context(denoiser.countable(network, is_checkpointed))
        step = _Step(denoiser, counted)
        weights = weights_on_meta(step, dtype)
        memory = Memory(weights)
        latents, prompt = inputs_on_meta(denoiser, conditioning, size)
        times = times_on_meta(denoiser)
        undo.enter_context(memory)
        torch.func.functional_call(step, weights, (latents, times, prompt))
        return memory.peak


class _Step(nn.Module):
    """Forward and backward, in one call, as blocks that are computed again need the same stand-ins for weights."""

    def __init__(self, denoiser: Denoiser, network: nn.Module) -> None:
        super().__init__()
        self.network = network
        self._denoiser = denoiser

    def forward(self, latents: torch.Tensor, times: torch.Tensor, prompt: Any) -> None:
        trained = [tensor for tensor in self.network.parameters() if tensor.requires_grad]
        loss = (self._denoiser.predict(self.network, latents, times, prompt) - latents).square().mean()
        torch.autograd.grad(loss, trained, allow_unused=True)
