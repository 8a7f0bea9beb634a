"""What a card would be asked to do: bytes, products, kernels, and where the host waits for it."""

from __future__ import annotations

import inspect
import weakref
from collections import Counter
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.flop_counter import flop_registry

from .device import ATEN, NAME, Card, on_card, tensors_in

BLOCK = 512
"""CUDA's allocator rounds to so many bytes."""
_TRAINER = str(Path(__file__).resolve().parent.parent.parent / "trainer")
# They take no time on a card: no kernel is started for them.
_FREE = {
    ATEN.empty.memory_format,
    ATEN.empty_strided.default,
    ATEN.empty_like.default,
    ATEN.detach.default,
    ATEN.new_empty.default,
    ATEN.new_empty_strided.default,
    ATEN._unsafe_view.default,
    ATEN.lift_fresh.default,
}
# The host waits for the card to learn how large the result is, or what it is.
_WAITS = {ATEN.nonzero.default, ATEN.equal.default, ATEN.masked_select.default, ATEN._unique2.default}
_READS = {torch.Tensor.tolist, torch.Tensor.numpy, torch.Tensor.cpu, torch.Tensor.__array__}
_BY_MASK = {ATEN.index.Tensor, ATEN.index_put.default, ATEN.index_put_.default}


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
            self.now.syncs[_place()] += 1

    def run(self, function: Any, args: Any, kwargs: Any, given: list[torch.Tensor]) -> Any:
        made = function(*args, **kwargs)
        results = tensors_in((made,))
        packet = function._overloadpacket
        if packet in flop_registry:
            self.now.flop += flop_registry[packet](*args, **kwargs, out_val=made)
        for tensor in results:
            if on_card(tensor):
                self._allocated(tensor)
        here, there = any(map(on_card, given)), any(map(on_card, results))
        if function in (ATEN._to_copy.default, ATEN.copy_.default):
            source, target = (given[1] if function is ATEN.copy_.default else given[0]), results[0]
            if on_card(source) and not on_card(target):
                self.now.syncs[_place()] += 1
            elif on_card(target) and not on_card(source):
                self.now.uploads[_place()] += 1
            elif there and source.dtype != target.dtype:
                self.now.casts += target.nbytes
                self.now.cast_kernels += 1
        elif here and _waits(function, args):
            self.now.syncs[_place()] += 1
        if there and _starts_a_kernel(function):
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


class Dispatched(TorchDispatchMode):
    """Counts operations on real tensors, on whatever device, of the thread that has entered it.

    On a CPU nothing tells what would be on a card: what is drawn on the host before it goes there counts as well, and
    ``.to()`` never counts as a wait. :class:`Counting` can tell.

    Attributes:
        kernels: torch's own operations but for views, allocations and reads of a number; a foreach operation is one.
        syncs: places in the trainer where the host reads a tensor's content, or needs a result to know its size.
    """

    def __init__(self) -> None:
        super().__init__()
        self.kernels = 0
        self.syncs: Counter[str] = Counter()
        self._reads = _Reads(self.syncs)

    def __enter__(self) -> Dispatched:
        self._reads.__enter__()
        super().__enter__()
        return self

    def __exit__(self, *error: Any) -> None:
        super().__exit__(*error)
        self._reads.__exit__(*error)

    def __torch_dispatch__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if function is ATEN._local_scalar_dense.default:
            self.syncs[_place()] += 1
        elif function.namespace == "aten":  # others are the profiler's marks
            self.kernels += _starts_a_kernel(function)
            if _waits(function, args):
                self.syncs[_place()] += 1
        return function(*args, **(kwargs or {}))


class _Reads(TorchFunctionMode):
    """Counts the reads of a whole tensor, which on a CPU are no operations."""

    def __init__(self, syncs: Counter[str]) -> None:
        super().__init__()
        self._syncs = syncs

    def __torch_function__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if function in _READS:
            self._syncs[_place()] += 1
        return function(*args, **(kwargs or {}))


def _starts_a_kernel(function: Any) -> bool:
    return function not in _FREE and not function.is_view


def _waits(function: Any, args: Any) -> bool:
    masks = function in _BY_MASK and any(index is not None and index.dtype == torch.bool for index in args[1])
    return masks or function in _WAITS


def _place() -> str:
    """The innermost line of the trainer, without its number: file and function."""
    frame = inspect.currentframe()
    while frame is not None:
        if frame.f_code.co_filename.startswith(_TRAINER):
            return f"{Path(frame.f_code.co_filename).stem}.{frame.f_code.co_name}"
        frame = frame.f_back
    return "elsewhere"
