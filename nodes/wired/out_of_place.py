"""Lets autograd differentiate ComfyUI's blocks, which add to their hidden states in place."""

from __future__ import annotations

import dis
import sys
from collections.abc import Callable, Mapping, Sequence
from types import CodeType
from typing import Any

import torch
from torch.overrides import TorchFunctionMode

from .kernels import reference_of


class OutOfPlace(TorchFunctionMode):
    """Inside, ``x += y`` and its like make a new tensor where autograd records.

    Blocks of diffusion transformers are written for sampling. ``x += gate * attention(norm(x))`` overwrites a tensor
    that the norm's backward pass needs, which autograd reports as an error, and one from which gradient checkpointing
    recomputes the block, which goes unnoticed and gives wrong gradients. Python assigns the result of ``x += y`` to
    ``x``, so a new tensor can take its place. Autograd keeps the old one in any case: this uses no more memory than
    copying on write (``torch.autograd.graph.allow_mutation_on_saved_tensors``), is faster, and also works in
    checkpointed blocks.

    ``x.add_(y)`` reaches torch as the same function, but its result may be ignored. So it is left alone; the caller's
    bytecode tells which of the two it is.

    A mode applies to the current thread only. On a GPU, autograd recomputes checkpointed blocks in a thread of its own,
    so the mode is also entered inside of what is recomputed.
    """

    def __torch_function__(
        self, func: Callable[..., Any], types: Any, args: Sequence[Any] = (), kwargs: Mapping[str, Any] | None = None
    ) -> Any:
        """See :class:`torch.overrides.TorchFunctionMode`."""
        keywords = kwargs or {}
        if not torch.is_grad_enabled() or not _is_recorded((*args, *keywords.values())):
            return func(*args, **keywords)
        reference = reference_of(func)
        if reference is not None:
            return reference(*args, **keywords)
        other = _INSTEAD.get(func)
        if other is None or keywords:
            return func(*args, **keywords)
        caller = sys._getframe(1)
        if not _is_assignment(caller.f_code, caller.f_lasti):
            return func(*args)
        found = other(*args)
        return found if found.dtype == args[0].dtype else found.to(args[0].dtype)


def _is_recorded(args: Sequence[Any]) -> bool:
    return any(isinstance(value, torch.Tensor) and value.requires_grad for value in args)


_assignments: dict[tuple[CodeType, int], bool] = {}


def _is_assignment(code: CodeType, at: int) -> bool:
    """Whether the instruction at this offset is one of ``+=``, ``-=``, ``*=`` and ``/=``."""
    key = code, at
    if key not in _assignments:
        found = next((one for one in dis.get_instructions(code) if one.offset == at), None)
        _assignments[key] = found is not None and (
            found.opname.startswith("INPLACE_")  # Python 3.10
            or (found.opname == "BINARY_OP" and found.argrepr.endswith("="))
        )
    return _assignments[key]


_INSTEAD: dict[Callable[..., Any], Callable[..., torch.Tensor]] = {
    torch.Tensor.add_: torch.add,
    torch.Tensor.sub_: torch.sub,
    torch.Tensor.mul_: torch.mul,
    torch.Tensor.div_: torch.div,
}
