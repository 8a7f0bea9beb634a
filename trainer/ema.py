"""A running average of the adapter's weights (Polyak averaging)."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING

import torch

if TYPE_CHECKING:
    from torch import nn


class AdapterAverage:
    """``average <- decay * average + (1 - decay) * weights`` after every step, starting from the first weights.

    Args:
        parameters: what is averaged; the average lies beside each, on the same device.
        decay: 0..1.
    """

    def __init__(self, parameters: list[nn.Parameter], decay: float) -> None:
        self._parameters = parameters
        self._decay = decay
        self.average = [parameter.detach().clone() for parameter in parameters]

    @torch.no_grad()
    def update(self) -> None:
        """Take the current weights in."""
        for average, parameter in zip(self.average, self._parameters, strict=True):
            average.lerp_(parameter, 1.0 - self._decay)

    @contextmanager
    def applied(self) -> Iterator[None]:
        """Inside, the model has the average in place of its weights; afterwards its own bits again."""
        own = [parameter.detach().clone() for parameter in self._parameters]
        try:
            self._set(self.average)
            yield
        finally:
            self._set(own)

    @torch.no_grad()
    def _set(self, values: list[torch.Tensor]) -> None:
        for parameter, value in zip(self._parameters, values, strict=True):
            parameter.copy_(value)
