"""The loss (DreamBooth: arXiv 2208.12242, equation 2)."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch.nn.functional import mse_loss

from ..base.denoiser import Denoiser
from .batch import Batch, Term

INSTANCE_LOSS = "instance_loss"
"""Name of the loss term of the photos."""


@dataclass(frozen=True)
class Losses:
    """The loss of a batch.

    Attributes:
        total: the weighted sum, a differentiable scalar.
        terms: unweighted scalars by name, detached; with a :class:`~trainer.preserve.preservation.PhotoLoss`, both the
            plain loss and that one.
        each: loss of each image, [b], detached.
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
    base: torch.Tensor | None = None,
) -> Losses:
    """The sum of ``weight * mse`` over the terms, each averaged over its own images.

    With class images this is the DreamBooth loss, ``mse(photos) + prior_loss_weight * mse(class images)``.

    Args:
        prediction, target: float32 [b, c, h, w].
        losses: name of each image's term, b; equal names are adjacent.
        terms: terms of the whole micro-step, so that the losses of micro-batches add up to its loss.
        weights: a factor for each image, float32 [b]; None for 1.
        masks: float32 [m, 1, h, w]. The errors of the first m images are averaged over their masks, so that a small
            subject counts as much as a large one; an image with an empty mask counts as 0.
        base: the base's prediction, shaped like ``prediction``, which the loss of photos may compare with.
    """
    each = _image_losses(prediction, target, weights, masks)
    total: torch.Tensor | None = None
    found: dict[str, torch.Tensor] = {}
    for term in terms:
        rows = [row for row, name in enumerate(losses) if name == term.name]
        if not rows:
            continue
        images = slice(rows[0], rows[-1] + 1)
        loss = each[images].sum() / term.pictures
        found[term.name] = loss.detach()
        if term.photo_loss is not None:
            assert base is not None, "the base's prediction is needed"
            of_base = _image_losses(base, target, weights, masks)
            loss = term.photo_loss.of(each[images], of_base[images]).sum() / term.pictures
            found[term.photo_loss.name] = loss.detach()
        weighted = loss if term.weight == 1.0 else term.weight * loss
        total = weighted if total is None else total + weighted
    assert total is not None, "every image belongs to a term"
    return Losses(total, found, each.detach())


def _image_losses(
    prediction: torch.Tensor, target: torch.Tensor, weights: torch.Tensor | None, masks: torch.Tensor | None
) -> torch.Tensor:
    """The loss of each image, [b]."""
    errors = mse_loss(prediction, target, reduction="none")
    each = errors.mean(dim=(1, 2, 3))
    if masks is not None:
        masked = len(masks)
        covered = (masks.mean(dim=(1, 2, 3))).clamp(min=1e-6)
        each = torch.cat([(errors[:masked] * masks).mean(dim=(1, 2, 3)) / covered, each[masked:]])
    return each if weights is None else each * weights


def batch_losses(
    denoiser: Denoiser, network: Any, batch: Batch, terms: Sequence[Term], snr_gamma: float = 0.0
) -> Losses:
    """Add noise, predict, and compute the loss; photos and class images share one forward pass.

    Args:
        network: from the denoiser, possibly wrapped by accelerate.
        terms: see :func:`weighted_losses`.
        snr_gamma: min-SNR weighting; 0 for equal weights.
    """
    noisy_latents = denoiser.noisy_latents(batch.latents, batch.noise, batch.times)
    prediction = denoiser.predict(network, noisy_latents, batch.times, batch.conditioning)
    target = denoiser.target(batch.latents, batch.noise, batch.times)
    if batch.base is not None and batch.from_base:
        from_base = torch.tensor(batch.from_base, device=target.device)
        target = torch.where(from_base[:, None, None, None], batch.base, target)
    weights = denoiser.loss_weights(batch.times, snr_gamma)
    return weighted_losses(prediction, target, batch.losses, terms, weights, batch.masks, batch.base)
