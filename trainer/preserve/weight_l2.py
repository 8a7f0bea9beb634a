"""A penalty on how far the weights are from the base's (arXiv 2505.19519, "Preserve and Personalize").

If no weight is far from the base's, no prediction is, for any prompt (the paper bounds it by the network's Lipschitz
constant). The paper penalises the sum of squares of all weights' changes; those of a LoRA are ``scale * up @ down``.

Costs next to nothing: no image is added, and the products of large matrices are avoided. Needs nothing.
"""

from __future__ import annotations

from collections.abc import Hashable, Iterable, Mapping, Sequence
from typing import ClassVar

import torch

from ..files.storage import canonical_json, sha256_of
from .adapter_layer import AdapterLayer
from .curvature_estimate import CurvatureEstimate
from .preservation import Preservation
from .priors import ClassPriors

WEIGHT_LOSS = "weight_loss"

FORMAT_VERSION = 1
"""Part of the key: increased when the same settings no longer give the same weights."""


class WeightL2(Preservation):
    """Adds the squared Frobenius norm of the LoRA's change of the weights.

    Args:
        weight: its factor at ``prior_loss_weight`` 1. The paper's code has 50, with which a LoRA at usual rates learns
            nothing (docs/preservation.md).
    """

    name: ClassVar[str] = "weight_l2"
    losses: ClassVar[Mapping[str, str]] = {WEIGHT_LOSS: "weights"}

    def __init__(self, weight: float = 0.05) -> None:
        self._weight = weight

    @classmethod
    def create(cls, class_word: str, priors: ClassPriors | None) -> WeightL2:
        """Ignores class images."""
        return cls()

    @property
    def key(self) -> str | None:
        """A digest of the weight."""
        return sha256_of(self.name, canonical_json([FORMAT_VERSION, self._weight]))

    def penalty(
        self, layers: Sequence[AdapterLayer], weight: float, estimate: CurvatureEstimate | None
    ) -> Mapping[str, torch.Tensor]:
        """``weight * |scale * up @ down|^2``, summed over the layers."""
        return {WEIGHT_LOSS: self._weight * weight * squared_norm(layers)}


def squared_norm(layers: Iterable[AdapterLayer]) -> torch.Tensor:
    """``|scale * up @ down|^2``, summed over the layers.

    Computed as ``scale^2 tr((down down^T)(up^T up))``, from two products of [rank, rank], for all layers of one shape
    at a time: a GPU would otherwise wait for hundreds of tiny kernels.
    """
    alike: dict[Hashable, list[AdapterLayer]] = {}
    for layer in layers:
        alike.setdefault((layer.down.shape, layer.up.shape, layer.scale), []).append(layer)
    norms = []
    for group in alike.values():
        down = torch.stack([layer.down.flatten(1) for layer in group])
        up = torch.stack([layer.up.flatten(1) for layer in group])
        norms.append(group[0].scale ** 2 * ((down @ down.mT) * (up.mT @ up)).sum())
    return torch.stack(norms).sum()
