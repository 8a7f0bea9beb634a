"""What a stretch of a program asks of a device: kernels, products, casts, and where the host waits for it.

Also read by the tests of a step's cost, and by the pretended card in ``tests/card/``.
"""

from __future__ import annotations

import inspect
import os
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.flop_counter import flop_registry

ATEN = torch.ops.aten
_TRAINER = str(Path(__file__).resolve().parent.parent / "trainer") + os.sep
_IN_COMFYUI = f"{os.sep}custom_nodes{os.sep}", f"{os.sep}trainer{os.sep}"
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
_COPIES = {ATEN._to_copy.default, ATEN.copy_.default}
_OPTIMIZER = str(Path("torch") / "optim")
_MODE_KEYS = (torch._C.DispatchKey.Python, torch._C.DispatchKey.PythonTLSSnapshot)
_FUSED_ATTENTION = (
    "_scaled_dot_product_flash_attention",
    "_scaled_dot_product_flash_attention_for_cpu",
    "_scaled_dot_product_efficient_attention",
    "_scaled_dot_product_cudnn_attention",
    "_scaled_dot_product_fused_attention_overrideable",
)


class Dispatched(TorchDispatchMode):
    """Counts operations on real tensors of the thread that has entered it, and of its backward pass.

    On a CPU nothing tells what would be on a card: what is drawn on the host before it goes there counts as well, and
    ``.to()`` never counts as a wait. The pretended card of ``tests/card/`` can tell.

    Args:
        device: what is counted happens on devices of this type.

    Attributes:
        kernels: torch's own operations but for views, allocations and reads of a number; a foreach operation is one.
        syncs: places in the trainer where the host reads a tensor's content, or needs a result to know its size.
        cast_kernels: of the kernels, those that only copy to another dtype.
        casts: bytes that they write.
        flop: of products and convolutions, forward and backward. Attention counts as its two products forward and four
            backward, in one kernel or several: what a fused kernel computes again does not count.
    """

    def __init__(self, device: str = "cpu") -> None:
        super().__init__()
        self.device = device
        self.kernels = 0
        self.syncs: Counter[str] = Counter()
        self.cast_kernels = 0
        self.casts = 0
        self.flop = 0
        self._reads = _Reads(self.syncs, device)

    def __enter__(self) -> Dispatched:
        self._reads.__enter__()
        super().__enter__()
        return self

    def __exit__(self, *error: Any) -> None:
        super().__exit__(*error)
        self._reads.__exit__(*error)

    def __torch_dispatch__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        made = function(*args, **kwargs)
        if function is ATEN._local_scalar_dense.default:
            if args[0].device.type == self.device and not _by_optimizer():
                self.syncs[place()] += 1
        elif function.namespace == "aten":  # others are the profiler's marks
            self._count(function, args, kwargs, made)
        return made

    def _count(self, function: Any, args: Any, kwargs: Any, made: Any) -> None:
        given, results = list(_tensors(args)), list(_tensors((made,)))
        is_here = self.device == "cpu" or any(tensor.device.type == self.device for tensor in (*results, *given))
        if not is_here:
            return
        self.flop += flop_of(function, args, kwargs, made)
        if function in _COPIES and self.device != "cpu" and not _all_on(self.device, results):
            self.syncs[place()] += 1
            return
        self.kernels += starts_a_kernel(function)
        if waits(function, args):
            self.syncs[place()] += 1
        if function in _COPIES and results:
            source = args[1] if function is ATEN.copy_.default else args[0]
            if source.dtype != results[0].dtype and source.device == results[0].device:
                self.cast_kernels += 1
                self.casts += results[0].nbytes
        if function is ATEN._foreach_copy_.default and args[0][0].dtype != args[1][0].dtype:
            self.cast_kernels += 1
            self.casts += sum(tensor.nbytes for tensor in args[0])


@contextmanager
def outliving_inference_mode() -> Iterator[None]:
    """Inside, a mode that is entered within a block of ``torch.inference_mode`` stays on after the block. By itself it
    goes silent there: the block's end restores torch's state of its start, in which there was no mode.

    The block must begin inside of this too, as it may ask for its own end when it begins.
    """
    original = torch.inference_mode.__exit__

    def leave(self: Any, *error: Any) -> None:
        is_on = torch._C._len_torch_dispatch_stack() > 0
        original(self, *error)
        for key in _MODE_KEYS:
            torch._C._dispatch_tls_set_dispatch_key_included(key, is_on)

    torch.inference_mode.__exit__ = leave  # type: ignore[method-assign]
    try:
        yield
    finally:
        torch.inference_mode.__exit__ = original  # type: ignore[method-assign]


class _Reads(TorchFunctionMode):
    """Counts the reads of a whole tensor, which on a CPU are no operations."""

    def __init__(self, syncs: Counter[str], device: str) -> None:
        super().__init__()
        self._syncs, self._device = syncs, device

    def __torch_function__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if self._device == "cpu" and function in _READS:
            self._syncs[place()] += 1
        return function(*args, **(kwargs or {}))


def starts_a_kernel(function: Any) -> bool:
    """Whether an operation does anything on a card: views and allocations do not."""
    return function not in _FREE and not function.is_view


def waits(function: Any, args: Any) -> bool:
    """Whether the host must know a result of the card before it can go on."""
    masks = function in _BY_MASK and any(index is not None and index.dtype == torch.bool for index in args[1])
    return masks or function in _WAITS


def flop_of(function: Any, args: Any, kwargs: Any, made: Any) -> int:
    """Two for each multiplication of a product or a convolution; 0 for other operations."""
    packet = function._overloadpacket
    if packet in _attention:
        return _attention[packet](args)
    return int(flop_registry[packet](*args, **kwargs, out_val=made)) if packet in flop_registry else 0


def place() -> str:
    """The innermost line of the trainer, without its number: file and function."""
    frame = inspect.currentframe()
    while frame is not None:
        name = frame.f_code.co_filename
        if name.startswith(_TRAINER) or all(part in name for part in _IN_COMFYUI):
            return f"{Path(name).stem}.{frame.f_code.co_name}"
        frame = frame.f_back
    return "elsewhere"


def _by_optimizer() -> bool:
    """Whether torch's optimizer reads its own number of steps, which stays on the host whatever the device."""
    frame = inspect.currentframe()
    for _ in range(8):  # of the modes here, and then the reading one
        if frame is not None:
            if frame.f_code.co_filename.rpartition(os.sep)[0].endswith(_OPTIMIZER):
                return True
            frame = frame.f_back
    return False


def _attention_forward(args: Any) -> int:
    query, key, value = (tensor.shape for tensor in args[:3])
    return int(2 * query[:-1].numel() * key[-2] * (query[-1] + value[-1]))


def _attention_backward(args: Any) -> int:
    return 2 * _attention_forward(args[1:])


_attention = {
    getattr(ATEN, name + suffix): count
    for name in _FUSED_ATTENTION
    for suffix, count in (("", _attention_forward), ("_backward", _attention_backward))
    if hasattr(ATEN, name + suffix)
}


def _tensors(values: Any) -> Iterator[torch.Tensor]:
    for value in values:
        if isinstance(value, torch.Tensor):
            yield value
        elif isinstance(value, (tuple, list)):
            yield from _tensors(value)


def _all_on(device: str, tensors: list[torch.Tensor]) -> bool:
    return all(tensor.device.type == device for tensor in tensors)
