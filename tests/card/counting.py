"""What the pretended card is asked to do: bytes, products, kernels, and where the host waits for it."""

from __future__ import annotations

import weakref
from collections import Counter
from dataclasses import dataclass, field
from typing import Any

import torch

from subjectbooth.benchmarks.counting import flop_of, place, starts_a_kernel, waits

from .device import ATEN, NAME, Card, on_card, tensors_in

BLOCK = 512
"""CUDA's allocator rounds to so many bytes."""


@dataclass
class Counts:
    """Of one step.

    Attributes:
        peak: the most bytes that were alive.
        flop: of products and convolutions, forward and backward.
        kernels: operations that start one (views do not).
        syncs: places in the trainer where the host waits for the card, and how often.
        uploads: tensors that the host copies to the card.
        casts: bytes that were copied only to have another dtype.
        cast_kernels: how often.
    """

    peak: int = 0
    flop: int = 0
    kernels: int = 0
    syncs: Counter[str] = field(default_factory=Counter)
    uploads: Counter[str] = field(default_factory=Counter)
    casts: int = 0
    cast_kernels: int = 0

    def to_json(self) -> dict[str, Any]:
        """All of it as JSON values."""
        return {**vars(self), "syncs": dict(self.syncs), "uploads": dict(self.uploads)}


class Counting(Card):
    """A pretended card that counts. :attr:`now` is what was counted since :meth:`next_step`."""

    def __init__(self, capacity: int | None = None) -> None:
        super().__init__(capacity)
        self.now = Counts()
        self.live = 0
        self._sizes: dict[int, int] = {}

    def next_step(self) -> Counts:
        """What was counted, and start again."""
        done, self.now = self.now, Counts(peak=self.live)
        return done

    def host_reads(self, tensor: torch.Tensor) -> None:
        if on_card(tensor):
            self.now.syncs[place()] += 1

    def run(self, function: Any, args: Any, kwargs: Any, given: list[torch.Tensor]) -> Any:
        made = function(*args, **kwargs)
        results = tensors_in((made,))
        self.now.flop += flop_of(function, args, kwargs, made)
        for tensor in results:
            if on_card(tensor):
                self._allocated(tensor)
        here, there = any(map(on_card, given)), any(map(on_card, results))
        if function in (ATEN._to_copy.default, ATEN.copy_.default):
            source, target = (given[1] if function is ATEN.copy_.default else given[0]), results[0]
            if on_card(source) and not on_card(target):
                self.now.syncs[place()] += 1
            elif on_card(target) and not on_card(source):
                self.now.uploads[place()] += 1
            elif there and source.dtype != target.dtype:
                self.now.casts += target.nbytes
                self.now.cast_kernels += 1
        elif here and waits(function, args):
            self.now.syncs[place()] += 1
        if there and starts_a_kernel(function):
            self.now.kernels += 1
        return made

    def _allocated(self, tensor: torch.Tensor) -> None:
        storage = tensor.untyped_storage()
        key = storage._cdata
        if key in self._sizes:  # a view of what is counted
            return
        size = -(-storage.nbytes() // BLOCK) * BLOCK
        if self.capacity is not None and self.live + size > self.capacity:
            raise torch.OutOfMemoryError(
                f"CUDA out of memory. Tried to allocate {size} bytes, {self.live} of {self.capacity} in use ({NAME})"
            )
        self._sizes[key] = size
        self.live += size
        self.now.peak = max(self.now.peak, self.live)
        weakref.finalize(storage, self._freed, key)

    def _freed(self, key: int) -> None:
        self.live -= self._sizes.pop(key, 0)
