"""The peak memory of this process, and how many copies of the base's weights it holds."""

from __future__ import annotations

import gc
import json
from collections.abc import Mapping
from pathlib import Path

import torch

FINGERPRINTS = "fingerprints.json"
_LARGEST, _VALUES = 10, 16


def peak_bytes() -> int:
    """The most memory that this process has held since :func:`restart_peak`; 0 where the system does not tell."""
    return status_bytes("VmHWM")


def status_bytes(name: str) -> int:
    """A line of Linux' status of this process: ``RssAnon`` is its own memory, ``RssFile`` are mapped files."""
    try:
        status = Path("/proc/self/status").read_text("utf-8")
    except OSError:
        return 0
    line = next(line for line in status.splitlines() if line.startswith(f"{name}:"))
    return int(line.split()[1]) * 1024


def restart_peak() -> bool:
    """Forget the peak so far; returns whether the system allows that."""
    if torch.cuda.is_available():
        torch.cuda.reset_peak_memory_stats()
    try:
        Path("/proc/self/clear_refs").write_text("5", "utf-8")
    except OSError:
        return False
    return True


def device_peak_bytes() -> int:
    """The most memory that tensors on the GPU have held since :func:`restart_peak`; 0 without one."""
    return torch.cuda.max_memory_allocated() if torch.cuda.is_available() else 0


def fingerprints(weights: Mapping[str, torch.Tensor]) -> list[list[float]]:
    """What tells a copy of a network from other tensors: size and first values of its largest weights."""
    largest = sorted(weights.values(), key=lambda tensor: tensor.numel(), reverse=True)[:_LARGEST]
    return [[tensor.numel(), *_first(tensor).tolist()] for tensor in largest]


def save_fingerprints(weights: Mapping[str, torch.Tensor], folder: Path) -> None:
    """Write them to a file in that folder."""
    (folder / FINGERPRINTS).write_text(json.dumps(fingerprints(weights)), "utf-8")


def load_fingerprints(folder: Path) -> list[list[float]]:
    """What :func:`save_fingerprints` has written there."""
    found: list[list[float]] = json.loads((folder / FINGERPRINTS).read_text("utf-8"))
    return found


def copies_of(known: list[list[float]]) -> float:
    """How often the weights of :func:`fingerprints` are in this process's memory, in whatever dtype; their mean."""
    values: dict[float, list[torch.Tensor]] = {size: [] for size, *_ in known}
    for size, *numbers in known:
        values[size].append(torch.tensor(numbers))
    seen: set[int] = set()
    for tensor in _float_tensors():
        storage = tensor.untyped_storage()._cdata
        if tensor.numel() in values and storage not in seen:
            first = _first(tensor)
            # bfloat16 keeps three digits.
            if any(torch.allclose(first, wanted, rtol=1e-2, atol=1e-4) for wanted in values[tensor.numel()]):
                seen.add(storage)
    return len(seen) / len(known)


def tensor_bytes() -> int:
    """All memory of tensors that Python knows, shared memory once. What a process holds beyond that, its allocator has
    kept, or it is not torch's."""
    storages = {tensor.untyped_storage()._cdata: tensor.untyped_storage().nbytes() for tensor in _float_tensors()}
    return sum(storages.values())


def _float_tensors() -> list[torch.Tensor]:
    found = []
    for candidate in gc.get_objects():
        # Not isinstance(), which asks objects for their class: some of other packages answer with an import. Other
        # subclasses, as the compiler leaves them, hold no memory or are none to compute with.
        if type(candidate) in (torch.Tensor, torch.nn.Parameter) and candidate.device.type in ("cpu", "cuda"):
            if candidate.is_floating_point() and candidate.layout == torch.strided:
                found.append(candidate)
    return found


def _first(tensor: torch.Tensor) -> torch.Tensor:
    with torch.no_grad():
        return tensor.detach().reshape(-1)[:_VALUES].float().cpu()
