"""One step's arithmetic (DreamBooth: arXiv 2208.12242, equation 2)."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch.nn.functional import mse_loss

from ..base.denoiser import Denoiser
from .batch import Batch, Term

INSTANCE_LOSS = "instance_loss"
"""The term of the photos."""


@dataclass(frozen=True)
class Losses:
    """Scalars.

    Attributes:
        total: carries the graph for the backward pass.
        terms: by name, unweighted and without the graph.
        each: [b], a picture's own part.
    """

    total: torch.Tensor
    terms: Mapping[str, torch.Tensor]
    each: torch.Tensor


def weighted_losses(
    prediction: torch.Tensor,
    target: torch.Tensor,
    losses: Sequence[str],
    terms: Sequence[Term],
    weights: torch.Tensor | None = None,
    masks: torch.Tensor | None = None,
) -> Losses:
    """``sum of weight * mse(pictures)`` over the terms, each averaged over its own pictures.

    With class images this is the DreamBooth loss, ``mse(photos) + prior_loss_weight * mse(class images)``.

    Args:
        prediction, target: float32 [b, c, h, w].
        losses: b names, which term each picture counts for; equal ones stand together.
        terms: of the whole micro-step, so that the parts of a batch that was split add up to it. The terms of pictures
            that are not in this part are 0 here.
        weights: float32 [b], a factor for each picture; None for 1.
        masks: float32 [m, 1, h, w]. The error of the first m pictures is averaged over their mask, so that a small
            subject counts as much as a large one; a photo whose mask is empty counts as 0.
    """
    errors = mse_loss(prediction, target, reduction="none")
    each = errors.mean(dim=(1, 2, 3))
    if masks is not None:
        masked = len(masks)
        covered = (masks.mean(dim=(1, 2, 3))).clamp(min=1e-6)
        each = torch.cat([(errors[:masked] * masks).mean(dim=(1, 2, 3)) / covered, each[masked:]])
    if weights is not None:
        each = each * weights
    total: torch.Tensor | None = None
    found: dict[str, torch.Tensor] = {}
    for term in terms:
        rows = [row for row, name in enumerate(losses) if name == term.name]
        if not rows:
            continue
        loss = each[rows[0] : rows[-1] + 1].sum() / term.pictures
        found[term.name] = loss.detach()
        weighted = loss if term.weight == 1.0 else term.weight * loss
        total = weighted if total is None else total + weighted
    assert total is not None, "every picture counts for a term"
    return Losses(total, found, each.detach())


def batch_losses(
    denoiser: Denoiser, network: Any, batch: Batch, terms: Sequence[Term], snr_gamma: float = 0.0
) -> Losses:
    """Noise the batch, ask the network, compare. Photos and what is added to them share one forward pass.

    Args:
        network: the denoiser's, perhaps wrapped by accelerate.
        terms: see :func:`weighted_losses`.
        snr_gamma: min-SNR weighting; 0 weights all times alike.
    """
    noisy_latents = denoiser.noisy_latents(batch.latents, batch.noise, batch.times)
    prediction = denoiser.predict(network, noisy_latents, batch.times, batch.conditioning)
    target = denoiser.target(batch.latents, batch.noise, batch.times)
    if batch.targets is not None:
        from_base = torch.tensor(batch.from_base, device=target.device)
        target = torch.where(from_base[:, None, None, None], batch.targets, target)
    weights = denoiser.loss_weights(batch.times, snr_gamma)
    return weighted_losses(prediction, target, batch.losses, terms, weights, batch.masks)
