"""Torch's switches and random state belong to the whole process: a run works under its own, and leaves no trace.

Another pack's default dtype, default device or autocast would otherwise train other weights under the same key.
"""

from __future__ import annotations

from collections.abc import Generator, Iterator
from contextlib import AbstractContextManager, ExitStack, contextmanager, nullcontext
from typing import Any, TypeVar

import torch

T = TypeVar("T")
R = TypeVar("R")

CPU = torch.device("cpu")

DTYPES = {"fp32": torch.float32, "fp16": torch.float16, "bf16": torch.bfloat16}
"""torch's type for each of our precisions."""


@contextmanager
def default_numerics(device: torch.device = CPU) -> Iterator[None]:
    """Inside, torch computes as it does in a fresh process; afterwards everything is as the others had it.

    Default dtype float32, no default device, no autocast, gradients, no forced deterministic algorithms, and
    :func:`fp32_matmul_precision`. Never hold it across a ``yield`` to the outside: see
    :func:`with_default_numerics`.

    Args:
        device: where the work is done.
    """
    dtype = torch.get_default_dtype()
    deterministic = torch.are_deterministic_algorithms_enabled()
    warn_only = torch.is_deterministic_algorithms_warn_only_enabled()
    with ExitStack() as stack:
        stack.enter_context(torch.inference_mode(False))
        stack.enter_context(torch.enable_grad())
        for kind in dict.fromkeys(("cpu", device.type)):
            if torch.amp.is_autocast_available(kind) and torch.is_autocast_enabled(kind):
                stack.callback(torch.set_autocast_enabled, kind, True)
                torch.set_autocast_enabled(kind, False)
        if torch.empty(0).device.type != "cpu":
            stack.enter_context(CPU)  # only where it is needed: every call into torch becomes slower by it
        if dtype != torch.float32:
            stack.callback(torch.set_default_dtype, dtype)
            torch.set_default_dtype(torch.float32)
        if deterministic:
            stack.callback(torch.use_deterministic_algorithms, True, warn_only=warn_only)
            torch.use_deterministic_algorithms(False)
        stack.enter_context(fp32_matmul_precision(device))
        yield


def with_default_numerics(events: Generator[T, Any, R], device: torch.device = CPU) -> Generator[T, None, R]:
    """Read ``events`` to its end, each of its resumptions inside :func:`default_numerics`, and none of its pauses."""
    try:
        while True:
            try:
                with default_numerics(device):
                    event = next(events)
            except StopIteration as finished:
                return finished.value
            yield event
    finally:
        with default_numerics(device):
            events.close()


@contextmanager
def seeded(seed: int, device: torch.device = CPU) -> Iterator[None]:
    """Inside, what draws from torch's own random state on the CPU and on ``device`` starts from ``seed``.

    Afterwards that state is as it was. ``torch.manual_seed`` is not used, as it also reseeds every GPU there is.

    Args:
        seed: any that :meth:`torch.Generator.manual_seed` takes.
        device: the one device whose state is seeded besides the CPU's.
    """
    cpu_state = torch.default_generator.get_state()
    kind: Any = getattr(torch, device.type, None) if device.type != "cpu" else None
    state = None
    try:
        torch.default_generator.manual_seed(seed)
        if hasattr(kind, "manual_seed"):
            with _current(kind, device):
                state = kind.get_rng_state()
                kind.manual_seed(seed)
        yield
    finally:
        torch.default_generator.set_state(cpu_state)
        if state is not None:
            with _current(kind, device):
                kind.set_rng_state(state)


def _current(kind: Any, device: torch.device) -> AbstractContextManager[Any]:
    """``torch.cuda`` and its like seed the current device of theirs."""
    return kind.device(device) if device.index is not None and hasattr(kind, "device") else nullcontext()


def has_tf32(device: torch.device) -> bool:
    """Whether the card multiplies fp32 in TF32 (NVIDIA Ampere and newer)."""
    return device.type == "cuda" and torch.version.hip is None and torch.cuda.get_device_capability(device)[0] >= 8


@contextmanager
def fp32_matmul_precision(device: torch.device) -> Iterator[None]:
    """What is computed in fp32 is, but for TF32 where the card has it, whatever others have set; then as it was.

    The adapter's own products are small next to the base's, but with precision fp32 TF32 is several times faster. On a
    CPU a setting of "medium" would let bf16 in.
    """
    wanted = "high" if has_tf32(device) else "highest"
    try:
        before = torch.get_float32_matmul_precision(), torch.backends.cudnn.allow_tf32
    except RuntimeError:  # the host has set torch's newer switches, which these ones must not be mixed with
        yield
        return
    if before[0] == wanted and (wanted == "highest" or before[1]):
        yield
        return
    try:
        torch.set_float32_matmul_precision(wanted)
        if wanted == "high":
            torch.backends.cudnn.allow_tf32 = True
        yield
    finally:
        torch.set_float32_matmul_precision(before[0])
        torch.backends.cudnn.allow_tf32 = before[1]
