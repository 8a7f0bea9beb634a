"""A running average of the adapter's weights (Polyak averaging)."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING

import torch

if TYPE_CHECKING:
    from torch import nn


class AdapterAverage:
    """``average <- d * average + (1 - d) * weights`` after every step, starting from the first weights.

    ``d`` warms up: it is ``min(decay, (1 + n) / (10 + n))`` after ``n`` earlier steps. Otherwise a short run would
    mostly save the initial weights: 94 % of them after 60 steps at 0.999.

    An adapter is hundreds of small tensors: torch's foreach functions, which its optimizers use too, do the same
    arithmetic for all of them in a kernel or a few.

    Args:
        parameters: what is averaged; there is one average for each, on the same device.
        decay: 0..1.
    """

    def __init__(self, parameters: list[nn.Parameter], decay: float) -> None:
        self._parameters: list[torch.Tensor] = list(parameters)
        self._decay = decay
        self.average = [parameter.detach().clone() for parameter in parameters]

    @torch.no_grad()
    def update(self, step: int) -> None:
        """Take in the weights after optimizer update number ``step``, counted from 0."""
        decay = min(self._decay, (1 + step) / (10 + step))
        torch._foreach_lerp_(self.average, self._parameters, 1.0 - decay)

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
        torch._foreach_copy_(self._parameters, values)
