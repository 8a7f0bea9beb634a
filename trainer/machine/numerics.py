"""Isolation from torch's process-wide settings and random state.

Otherwise another pack's default dtype, default device or autocast would change a run's weights but not its key.
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
"""The torch dtype of each precision."""


@contextmanager
def default_numerics(device: torch.device = CPU) -> Iterator[None]:
    """Run a block with torch's settings as in a fresh process, and restore them afterwards.

    Default dtype float32, no default device, no autocast, gradients enabled, no forced deterministic algorithms, and
    :func:`fp32_matmul_precision`. A generator must not hold this across a ``yield``; use
    :func:`with_default_numerics`.

    Args:
        device: the device that the block computes on.
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
            stack.enter_context(CPU)  # only if needed: it slows down every call into torch
        if dtype != torch.float32:
            stack.callback(torch.set_default_dtype, dtype)
            torch.set_default_dtype(torch.float32)
        if deterministic:
            stack.callback(torch.use_deterministic_algorithms, True, warn_only=warn_only)
            torch.use_deterministic_algorithms(False)
        stack.enter_context(fp32_matmul_precision(device))
        yield


def with_default_numerics(events: Generator[T, Any, R], device: torch.device = CPU) -> Generator[T, None, R]:
    """Iterate over ``events``, with :func:`default_numerics` active only while the generator itself runs."""
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
    """Seed torch's global random state on the CPU and on ``device`` for a block, and restore it afterwards.

    ``torch.manual_seed`` is not used because it also reseeds all other GPUs.

    Args:
        seed: any value that :meth:`torch.Generator.manual_seed` accepts.
        device: the device to seed in addition to the CPU.
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
    """Make ``device`` the current one: ``torch.cuda`` and similar modules seed the current device."""
    return kind.device(device) if device.index is not None and hasattr(kind, "device") else nullcontext()


def has_tf32(device: torch.device) -> bool:
    """Whether the GPU supports TF32 (NVIDIA Ampere and newer)."""
    return device.type == "cuda" and torch.version.hip is None and torch.cuda.get_device_capability(device)[0] >= 8


@contextmanager
def fp32_matmul_precision(device: torch.device) -> Iterator[None]:
    """Use TF32 matrix products if the GPU supports them, otherwise full fp32; restore the setting afterwards.

    With precision fp32, TF32 is several times faster. On a CPU, another pack's "medium" would allow bf16 products.
    """
    wanted = "high" if has_tf32(device) else "highest"
    try:
        before = torch.get_float32_matmul_precision(), torch.backends.cudnn.allow_tf32
    except RuntimeError:  # the host uses torch's newer precision settings, which cannot be mixed with these
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
