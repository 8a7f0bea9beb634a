"""One step's arithmetic (DreamBooth: arXiv 2208.12242, equation 2)."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from torch.nn.functional import mse_loss

from ..base.base_model import predict
from ..base.conditioning import Conditioning

if TYPE_CHECKING:
    from diffusers import DDPMScheduler


@dataclass(frozen=True)
class Batch:
    """Photos and, behind them, class images.

    Attributes:
        latents: float32 [b, 4, h/8, w/8], in the training space.
        noise: like ``latents``, standard normal.
        timesteps: int64 [b].
        conditioning: b prompts.
        instances: how many of the b, from the front, are photos; the others are class images.
        masks: float32 [instances, 1, h/8, w/8] in 0..1, the part of each photo that counts; None counts all of it.
        prompts: what ``conditioning`` was encoded from.
        labels: what each picture is called in messages.
    """

    latents: torch.Tensor
    noise: torch.Tensor
    timesteps: torch.Tensor
    conditioning: Conditioning
    instances: int
    masks: torch.Tensor | None = None
    prompts: tuple[str, ...] = ()
    labels: tuple[str, ...] = ()

    def split(self, pictures: int) -> list[Batch]:
        """The batch in parts of at most that many pictures, for a device that cannot take it whole."""
        count = len(self.latents)
        if pictures >= count:
            return [self]
        return [self._part(first, min(first + pictures, count)) for first in range(0, count, pictures)]

    def _part(self, first: int, last: int) -> Batch:
        pooled = self.conditioning.pooled
        conditioning = Conditioning(
            self.conditioning.hidden_states[first:last], pooled[first:last] if pooled is not None else None
        )
        masks = self.masks[first:last] if self.masks is not None and first < self.instances else None
        return Batch(
            self.latents[first:last],
            self.noise[first:last],
            self.timesteps[first:last],
            conditioning,
            max(0, min(self.instances, last) - first),
            masks,
            self.prompts[first:last],
            self.labels[first:last],
        )


@dataclass(frozen=True)
class Losses:
    """Scalars; ``total`` carries the graph for the backward pass. ``each`` is [b], a picture's own part."""

    total: torch.Tensor
    instance: torch.Tensor
    prior: torch.Tensor | None
    each: torch.Tensor


def prediction_target(
    noise_scheduler: DDPMScheduler,
    latents: torch.Tensor,
    noise: torch.Tensor,
    timesteps: torch.Tensor,
) -> torch.Tensor:
    """What the UNet should say: the noise (DDPM, arXiv 2006.11239), or v = sqrt(a) noise - sqrt(1-a) x
    (arXiv 2202.00512), like ``latents``."""
    if noise_scheduler.config["prediction_type"] == "v_prediction":
        return noise_scheduler.get_velocity(latents, noise, timesteps)  # type: ignore[arg-type]
    return noise


def min_snr_weights(noise_scheduler: DDPMScheduler, timesteps: torch.Tensor, snr_gamma: float) -> torch.Tensor:
    """float32 [b]: ``min(snr, gamma) / snr`` for epsilon, ``/ (snr + 1)`` for v (arXiv 2303.09556, section 3.4).

    With a zero terminal SNR the epsilon form would be 0/0 at the last timestep, where it is taken to be 1, its limit.
    """
    alphas = noise_scheduler.alphas_cumprod.to(timesteps.device)[timesteps]
    snr = alphas / (1.0 - alphas)
    capped = snr.clamp(max=snr_gamma)
    if noise_scheduler.config["prediction_type"] == "v_prediction":
        return capped / (snr + 1.0)
    return torch.where(snr > 0, capped / snr.clamp(min=1e-20), torch.ones_like(snr))


def dreambooth_loss(
    prediction: torch.Tensor,
    target: torch.Tensor,
    instances: int,
    prior_loss_weight: float,
    weights: torch.Tensor | None = None,
    masks: torch.Tensor | None = None,
    totals: tuple[int, int] | None = None,
) -> Losses:
    """``mse(photos) + prior_loss_weight * mse(class images)``, each averaged over its own part of the batch.

    Args:
        prediction, target: float32 [b, 4, h/8, w/8]; the first ``instances`` are photos.
        instances: 0..b.
        prior_loss_weight: lambda of the paper.
        weights: float32 [b], a factor for each picture; None for 1.
        masks: float32 [instances, 1, h/8, w/8]. A photo's error is averaged over its mask, so that a small subject
            counts as much as a large one; a photo whose mask is empty counts as 0.
        totals: photos and class images of the whole batch that this is a part of, so that the parts' losses add up
            to the batch's; None when it is whole.
    """
    photos, classes = totals or (instances, len(prediction) - instances)
    errors = mse_loss(prediction, target, reduction="none")
    each = errors.mean(dim=(1, 2, 3))
    if masks is not None and instances:
        covered = (masks.mean(dim=(1, 2, 3))).clamp(min=1e-6)
        each = torch.cat([(errors[:instances] * masks).mean(dim=(1, 2, 3)) / covered, each[instances:]])
    if weights is not None:
        each = each * weights
    instance = each[:instances].sum() / photos
    if not classes:
        return Losses(instance, instance.detach(), None, each.detach())
    prior = each[instances:].sum() / classes
    return Losses(instance + prior_loss_weight * prior, instance.detach(), prior.detach(), each.detach())


def batch_losses(
    unet: Any,
    noise_scheduler: DDPMScheduler,
    batch: Batch,
    prior_loss_weight: float,
    snr_gamma: float = 0.0,
    totals: tuple[int, int] | None = None,
) -> Losses:
    """Noise the batch, ask the UNet, compare. Photos and class images share one forward pass.

    Args:
        snr_gamma: min-SNR weighting; 0 weights all timesteps alike.
        totals: see :func:`dreambooth_loss`.
    """
    noisy_latents = noise_scheduler.add_noise(batch.latents, batch.noise, batch.timesteps)  # type: ignore[arg-type]
    prediction = predict(unet, noisy_latents, batch.timesteps, batch.conditioning)
    target = prediction_target(noise_scheduler, batch.latents, batch.noise, batch.timesteps)
    weights = min_snr_weights(noise_scheduler, batch.timesteps, snr_gamma) if snr_gamma else None
    return dreambooth_loss(prediction, target, batch.instances, prior_loss_weight, weights, batch.masks, totals)
