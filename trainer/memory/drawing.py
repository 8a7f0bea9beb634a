"""As many pictures drawn together as the memory allows."""

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
"""Draws the pictures ``first .. last`` (exclusive) together; see :meth:`trainer.base.denoiser.Denoiser.sample`."""


class Drawing:
    """Reads a generator, and keeps what it returns.

    Attributes:
        latents: what was drawn, once the iteration is over.
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
    """Draw ``count`` pictures, as many together as was asked for; where that is too much for the memory, fewer.

    Args:
        at_once: pictures together, 1 or more.
        steps: denoising steps of a picture.

    Yields:
        denoising steps done, of ``count * steps``. They go back where a batch is drawn again in smaller ones.

    Returns:
        latents, float32 [count, c, h, w], on the CPU.

    Raises:
        Exception: what torch raised where the memory is too small for a single picture.
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
        # Outside the handler: while it runs, the error keeps the failed attempt's tensors alive.
        at_once = (last - first) // 2
        free_memory(device)
    return torch.cat(drawn)


MOST_AT_ONCE = 4
"""Pictures drawn together; more are hardly faster."""


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
    """How many of ``count`` pictures to draw together: as many as fit in ``free`` bytes.

    On a CPU one: there several are no faster than one after the other, and a picture's last bits would depend on how
    many there are.

    Args:
        conditioning: the longest prompt, batch size 1.
        dtype: what the network computes in.
        free: bytes free on the device, the network being there; None when nobody can say.
    """
    if device.type == "cpu" or free is None or count < 2:
        return 1
    try:
        each = 2 * drawing_bytes(
            denoiser, network, conditioning, shape[1:], dtype
        )  # with the prompt, and with the negative one
    except Exception:  # a batch is a help: what cannot be counted (another diffusers, another torch) ends no run
        logger.warning("the memory of a picture could not be counted", exc_info=True)
        return 1
    return pictures_that_fit(lambda pictures: pictures * each, free, min(count, MOST_AT_ONCE))
