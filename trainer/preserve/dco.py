"""Direct Consistency Optimization (arXiv 2402.12004): learn a photo only as far as the base explains it worse.

With the loss of a photo and that of the base on the same noisy photo, ``d = loss - loss_of_base``, it minimises
``-log sigmoid(-beta d)`` in place of ``loss``. Its gradient is that of the plain loss times ``beta sigmoid(beta d)``: a
photo that is predicted better than by the base by a few times ``1 / beta`` no longer pulls. As in the authors' code,
losses are means over pixels and channels, and ``beta`` is 1000 at all times. Unlike there, everything is divided by
``beta / 2``, so that the gradient begins as that of the plain loss, and learning rate, clipping and the weights of
other terms keep their meaning. Their guidance by reward at sampling is not part of this.

Costs a forward pass of the base without gradients for each photo. Needs nothing.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import ClassVar

import torch
from torch.nn.functional import softplus

from ..files.storage import canonical_json, sha256_of
from .preservation import PhotoLoss, Preservation
from .priors import ClassPriors

CONSISTENCY_LOSS = "consistency_loss"

FORMAT_VERSION = 1
"""Part of the key: increased when the same settings no longer give the same weights."""


class DirectConsistency(Preservation):
    """Learns photos only until they are predicted better than by the base.

    Args:
        beta: how early that is, at ``prior_loss_weight`` 1; larger is earlier. The paper uses 1000 to 2000.
    """

    name: ClassVar[str] = "dco"
    losses: ClassVar[Mapping[str, str]] = {CONSISTENCY_LOSS: "consistency"}

    def __init__(self, beta: float = 1000.0) -> None:
        self._beta = beta

    @classmethod
    def create(cls, class_word: str, priors: ClassPriors | None) -> DirectConsistency:
        """Ignores class images."""
        return cls()

    @property
    def key(self) -> str | None:
        """A digest of beta."""
        return sha256_of(self.name, canonical_json([FORMAT_VERSION, self._beta]))

    def photo_loss(self, weight: float) -> PhotoLoss | None:
        """``-log sigmoid(-beta d) / (beta / 2)``; the plain loss, which is its limit, for a weight of 0."""
        beta = self._beta * weight
        if not beta:
            return None

        def of(losses: torch.Tensor, base_losses: torch.Tensor) -> torch.Tensor:
            return softplus(beta * (losses - base_losses)) * (2 / beta)  # softplus(x) is -log sigmoid(-x)

        return PhotoLoss(CONSISTENCY_LOSS, of)
