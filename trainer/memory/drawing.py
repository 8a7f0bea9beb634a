"""Samples images in batches that fit in memory."""

from __future__ import annotations

import logging
from collections.abc import Callable, Generator, Iterator
from typing import Any

import torch

from ..base.conditioning import Conditioning
from ..base.denoiser import Denoiser
from ..machine.out_of_memory import free_memory, is_out_of_memory
from .footprint import drawing_bytes
from .plan import pictures_that_fit

logger = logging.getLogger("subjectbooth")

Draw = Callable[[int, int], Generator[int, None, torch.Tensor]]
"""Samples the images ``first .. last`` (exclusive) in one batch; see :meth:`trainer.base.denoiser.Denoiser.sample`."""


class Drawing:
    """Iterates over a generator, and keeps its return value.

    Attributes:
        latents: the return value, after the iteration.
    """

    latents: torch.Tensor

    def __init__(self, generator: Generator[int, None, torch.Tensor]) -> None:
        self._generator = generator

    def __iter__(self) -> Iterator[int]:
        self.latents = yield from self._generator


def draw_all(
    draw: Draw,
    count: int,
    at_once: int,
    steps: int,
    device: torch.device,
) -> Generator[int, None, torch.Tensor]:
    """Sample ``count`` images in batches; if memory runs out, in smaller ones.

    Args:
        at_once: batch size, 1 or more.
        steps: denoising steps per image.

    Yields:
        denoising steps done, of ``count * steps``; lower again after a batch that did not fit.

    Returns:
        latents, float32 [count, c, h, w], on the CPU.

    Raises:
        Exception: torch's error, if not even one image fits.
    """
    drawn: list[torch.Tensor] = []
    first = 0
    while first < count:
        last = min(first + at_once, count)
        try:
            drawing = Drawing(draw(first, last))
            for done in drawing:
                yield first * steps + done * (last - first)
            drawn.append(drawing.latents)
            first = last
            continue
        except Exception as error:
            if last - first == 1 or not is_out_of_memory(error):
                raise
        # Outside the handler, in which the exception keeps the failed attempt's tensors alive.
        at_once = (last - first) // 2
        free_memory(device)
    return torch.cat(drawn)


MOST_AT_ONCE = 4
"""Maximum batch size; larger ones are hardly faster."""


def pictures_at_once(
    denoiser: Denoiser,
    network: Any,
    conditioning: Conditioning,
    shape: tuple[int, ...],
    dtype: torch.dtype,
    count: int,
    device: torch.device,
    free: int | None,
) -> int:
    """The batch size for sampling ``count`` images: as many as fit in ``free`` bytes.

    1 on a CPU, where batches are no faster, and an image's last bits would depend on the batch size.

    Args:
        conditioning: the longest prompt, batch size 1.
        dtype: dtype of the computation.
        free: bytes free on the device, which already holds the network; None if unknown.
    """
    if device.type == "cpu" or free is None or count < 2 or not denoiser.blocks(network):
        return 1  # without blocks that can be counted once each, counting takes longer than a larger batch saves
    try:
        # For the prompt and the negative prompt.
        each = 2 * drawing_bytes(denoiser, network, conditioning, shape[1:], dtype)
    except Exception:  # not essential: counting may fail with other versions of diffusers or torch
        logger.warning("the memory for sampling an image could not be estimated", exc_info=True)
        return 1
    return pictures_that_fit(lambda pictures: pictures * each, free, min(count, MOST_AT_ONCE))
