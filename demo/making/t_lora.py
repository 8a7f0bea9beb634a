"""T-LoRA (arXiv 2507.05964): the noisier the picture, the fewer of a LoRA's ranks are in use. A trial.

Very noisy pictures say little of the subject, and a LoRA that learns them by heart learns their backgrounds. So at time
``t`` of ``T`` only the first ``r(t) = r_min + floor((r - r_min) * (T - t) / T)`` ranks count, in training and when
pictures are drawn. This is what the paper calls Vanilla T-LoRA, without its orthogonal initialisation. LoRA files have
no such masks: ComfyUI and A1111 draw with all ranks at all times.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import replace
from functools import partial
from importlib import import_module
from typing import Any

import torch
from torch import nn
from torch.nn.functional import linear

from .schedule import STEPS

# This package has two names (see files.py), and the trainer is next to it under both.
_adapter: Any = import_module(f"{__name__.removesuffix('demo.making.t_lora')}trainer.learn.adapter")

SMALLEST_RANK = 4
"""The paper's ``r_min``: half the rank, which is 8 in the demo, as its authors train SDXL."""


def ranks_in_use(times: torch.Tensor, rank: int, smallest: int = SMALLEST_RANK) -> torch.Tensor:
    """``r(t)`` for each time, int64 [n]."""
    return smallest + ((rank - smallest) * (STEPS - times.long())).div(STEPS, rounding_mode="floor")


@contextmanager
def masked(network: Any, times: torch.Tensor) -> Iterator[None]:
    """Inside, each picture of a batch is predicted with the ranks of its time. Not thread-safe.

    Args:
        network: with the LoRA.
        times: [n], of the pictures that are predicted.
    """
    layers = _adapter.lora_layers(network) if isinstance(network, nn.Module) else []
    for layer in layers:
        rank = layer.r[_adapter.ADAPTER_NAME]
        mask = (torch.arange(rank, device=times.device) < ranks_in_use(times, rank)[:, None]).float()
        layer.sum = partial(_masked_sum, layer, mask)
    try:
        yield
    finally:
        for layer in layers:
            del layer.sum


def _masked_sum(
    layer: Any,
    mask: torch.Tensor,
    result: torch.Tensor,
    x: torch.Tensor,
    down: torch.Tensor,
    up: torch.Tensor,
    scale: float,
) -> torch.Tensor:
    """In place of the sum of :mod:`trainer.learn.lora_forward`; ``mask`` is [n, rank]."""
    if down.dim() == 2:
        low = linear(x, down)
        change = linear(low * mask.view(len(mask), *(1,) * (low.dim() - 2), -1), up)
    else:
        first, second = (part[_adapter.ADAPTER_NAME] for part in (layer.lora_A, layer.lora_B))
        change = second._conv_forward(first._conv_forward(x, down, None) * mask[:, :, None, None], up, None)
    return result + scale * change


def mean_over_masks(change: Callable[[Sequence[Any]], torch.Tensor], layers: Sequence[Any]) -> torch.Tensor:
    """The mean over time of a function of a LoRA's layers, each time with the ranks in use then.

    Args:
        change: of :class:`trainer.preserve.adapter_layer.AdapterLayer`.
    """
    rank = len(layers[0].down)
    used = ranks_in_use(torch.arange(STEPS), rank).bincount(minlength=rank + 1)
    found = [
        count / STEPS * change([replace(layer, down=layer.down[:ranks], up=layer.up[:, :ranks]) for layer in layers])
        for ranks, count in enumerate(used.tolist())
        if count > 1  # all ranks are in use at time 0 only
    ]
    return torch.stack(found).sum()


class MaskedNetwork:
    """A UNet with a LoRA, to draw with as T-LoRA does.

    Args:
        unet: the network.
    """

    def __init__(self, unet: Any) -> None:
        self.unet = unet

    def __call__(self, x: torch.Tensor, steps: torch.Tensor, context: torch.Tensor) -> torch.Tensor:
        with masked(self.unet, steps):
            prediction: torch.Tensor = self.unet(x, steps, context)
        return prediction
