"""The noise process and training target of a connected MODEL, read from its own sampling object."""

from __future__ import annotations

import copy
from functools import cached_property
from typing import Any

import comfy.model_sampling
import torch

from ...trainer.base.times import EDGE, spread

FLOW, EDM, DISCRETE = "flow", "edm", "discrete"

EDM_MEAN, EDM_DEVIATION = -1.2, 1.2
"""Of the logarithm of sigma in training (arXiv 2206.00364, table 1)."""


class Objective:
    """What is predicted, and at which noise levels it is learned. *Times* are ComfyUI's sigmas.

    Args:
        sampling: the model's ``model_sampling``: of a flow (velocity), of a table of noise levels (eps or v), or EDM.
        logit_normal: whether times are logit-normal or uniform, both before the shift, see
            :func:`trainer.base.times.spread`; EDM has its own.
        shift: of the times; None for the model's own.
    """

    def __init__(self, sampling: Any, logit_normal: bool = True, shift: float | None = None) -> None:
        self.sampling, self.logit_normal, self.shift = sampling, logit_normal, shift

    @cached_property
    def kind(self) -> str:
        """Which of the three: a flow interpolates, a table has its noise levels, EDM is continuous."""
        if isinstance(self.sampling, (comfy.model_sampling.CONST, comfy.model_sampling.COSMOS_RFLOW)):
            return FLOW
        return DISCRETE if isinstance(self.sampling, comfy.model_sampling.ModelSamplingDiscrete) else EDM

    def times(self, uniform: torch.Tensor) -> torch.Tensor:
        """Sigmas float32 [b] from uniform numbers in [0, 1), float64 [b]."""
        if self.kind == DISCRETE:
            table = self._on_host.sigmas
            index = spread(uniform, self.logit_normal, self.shift) * len(table)
            return table[index.long().clamp(max=len(table) - 1)].float().clone()
        uniform = uniform.clamp(EDGE, 1 - EDGE)
        if self.kind == EDM:
            return self._in_range((EDM_MEAN + EDM_DEVIATION * torch.special.ndtri(uniform)).exp())
        time = spread(uniform, self.logit_normal, self.shift)
        if isinstance(self.sampling, comfy.model_sampling.COSMOS_RFLOW):
            # A flow whose latents are not scaled, as those of EDM, so that sigma is the ratio of noise to latents.
            return self._in_range(time / (1 - time))
        if self.shift is not None:
            return time.float()
        return self._on_host.sigma(time * getattr(self.sampling, "multiplier", 1.0)).float()  # type: ignore[no-any-return]

    @cached_property
    def _on_host(self) -> Any:
        """A copy of the sampling object from which times are read without a wait for the device."""
        return copy.deepcopy(self.sampling).cpu()

    def _in_range(self, sigmas: torch.Tensor) -> torch.Tensor:
        return sigmas.clamp(float(self._on_host.sigma_min), float(self._on_host.sigma_max)).float()

    def noisy(self, latents: torch.Tensor, noise: torch.Tensor, times: torch.Tensor) -> torch.Tensor:
        """The latents [b, c, ...] noised to the sigmas [b]."""
        return self.sampling.noise_scaling(_along(times, latents), noise, latents)  # type: ignore[no-any-return]

    def target(self, latents: torch.Tensor, noise: torch.Tensor, times: torch.Tensor) -> torch.Tensor:
        """What the network should have said.

        ComfyUI makes the denoised image of a network's output: an affine function, of whatever the family predicts.
        Solved for the output in double precision, it gives the target: the noise, v, ``noise - latents`` of a flow.
        """
        wide = [_wide(tensor) for tensor in (latents, noise, times)]
        noisy = self.noisy(*wide)
        nothing = torch.zeros_like(noisy)
        offset = self.sampling.calculate_denoised(wide[2], nothing, noisy)
        slope = self.sampling.calculate_denoised(wide[2], nothing + 1, noisy) - offset
        return ((wide[0] - offset) / slope).float().to(latents.device)

    def loss_weights(self, times: torch.Tensor, snr_gamma: float) -> torch.Tensor | None:
        """Min-SNR (arXiv 2303.09556) for eps and v; flows and EDM are weighted by their times."""
        if not snr_gamma or self.kind != DISCRETE:
            return None
        snr = 1 / _wide(times).square()
        divisor = snr + 1 if isinstance(self.sampling, comfy.model_sampling.V_PREDICTION) else snr
        return (snr.clamp(max=snr_gamma) / divisor).float().to(times.device)

    def giving_output(self) -> Any:
        """A copy of the sampling object with which ComfyUI's model returns the network's own output."""
        found = copy.copy(self.sampling)
        found.__class__ = type("GivingOutput", (_GivingOutput, type(self.sampling)), {})
        return found


class _GivingOutput:
    def calculate_denoised(self, sigma: torch.Tensor, model_output: torch.Tensor, model_input: Any) -> torch.Tensor:
        return model_output


_DOUBLE = ("cpu", "cuda", "meta")
"""Kinds of devices that have double precision for sure; Apple's and some of Intel's have not."""


def _wide(tensor: torch.Tensor) -> torch.Tensor:
    """In double precision, on its device or else on the CPU."""
    return (tensor if tensor.device.type in _DOUBLE else tensor.cpu()).double()


def _along(times: torch.Tensor, latents: torch.Tensor) -> torch.Tensor:
    return times.to(latents.device).view(-1, *[1] * (latents.ndim - 1))
