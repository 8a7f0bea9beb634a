"""Device, precision, and isolation from accelerate's process-wide state."""

from __future__ import annotations

import os
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch

from ..config import AUTO, TrainConfig
from ..errors import require

_ACCELERATE = {"fp32": "no", "fp16": "fp16", "bf16": "no"}


def choose_precision(config: TrainConfig, device: torch.device, kept: str | None = None) -> tuple[str, tuple[str, ...]]:
    """The precision, and notes on what had to be changed. :mod:`trainer.memory.plan` resolves the other auto settings.

    Half precision is not used on a CPU: it works there, but is hundreds of times slower.

    Args:
        config: the requested settings.
        device: the training device.
        kept: the precision of the run being resumed, perhaps from another machine.
    """
    precision = kept or config.precision
    if precision == AUTO:
        if device.type != "cuda":
            return "fp32", ()
        return "bf16" if torch.cuda.is_bf16_supported(including_emulation=False) else "fp16", ()
    if precision == "fp16" and device.type == "cpu":
        return "fp32", ("precision fp16 needs a GPU; this run uses fp32",)
    return precision, ()


def rounding(config: TrainConfig, device: torch.device | None) -> int:
    """For a run's key: 1 where weights are rounded in another way than in older versions, otherwise 0.

    In half precision, those computed under autocast, with norms in float32; on a CUDA GPU, their AdamW was not fused.

    Args:
        config: the requested settings.
        device: where to train; None for the default device.
    """
    device = device or default_device()
    is_half = choose_precision(config, device)[0] != "fp32"
    return int(is_half or (device.type == "cuda" and config.optimizer == "adamw"))


class IsolatedAccelerate:
    """A private copy of accelerate's process-wide state for one run.

    All ``Accelerator`` objects in a process share their state and read more settings from the environment, so another
    run's precision, another pack or a line in a shell profile would affect how this run trains. Create accelerate's
    objects inside :meth:`installed`: they keep the state they were created with, and other packs keep theirs, even if
    they change it during a run.

    Args:
        device: the training device. None: accelerate's choice (``accelerate launch`` sets it in the environment).
    """

    def __init__(self, device: torch.device | None) -> None:
        require("accelerate")
        from accelerate.state import AcceleratorState, GradientState, PartialState

        self._states: dict[Any, dict[str, Any]] = {PartialState: {}, AcceleratorState: {}, GradientState: {}}
        self._launched = device is None

    @contextmanager
    def installed(self) -> Iterator[None]:
        """Let accelerate use this run's state and hide its environment variables. Keep the block short (milliseconds),
        because the whole process shares both."""
        with _installing, _without_settings(self._launched):
            # Replace the dict, not its content: objects of other packs hold a reference to theirs.
            before = {kind: kind.__dict__["_shared_state"] for kind in self._states}
            for kind, state in self._states.items():
                kind._shared_state = state
            try:
                yield
            finally:
                for kind, state in before.items():
                    kind._shared_state = state

    def device(self) -> torch.device:
        """The device that accelerate chooses."""
        from accelerate.state import PartialState

        cpu = os.environ.get("ACCELERATE_USE_CPU", "").lower() in ("1", "true", "yes", "y", "t", "on")
        with self.installed():
            return PartialState(cpu=cpu).device


def default_device() -> torch.device:
    """The device of a run that does not name one."""
    return IsolatedAccelerate(None).device()


_installing = threading.RLock()

_PROCESSES = (
    "RANK",
    "WORLD_SIZE",
    "LOCAL_RANK",
    "LOCAL_WORLD_SIZE",
    "PMI_RANK",
    "PMI_SIZE",
    "OMPI_COMM_WORLD_RANK",
    "OMPI_COMM_WORLD_SIZE",
    "MV2_COMM_WORLD_RANK",
    "MV2_COMM_WORLD_SIZE",
)
"""Variables that make a process one of several. Without ``accelerate launch`` they are leftovers of something else."""


@contextmanager
def _without_settings(launched: bool) -> Iterator[None]:
    """Hide accelerate's environment variables for a block. Changes that others make in the meantime are kept.

    Args:
        launched: keep what ``accelerate launch`` sets for processes and the device.
    """
    kept = ("ACCELERATE_TORCH_DEVICE",) if launched else ()
    hidden = {
        name: value
        for name, value in os.environ.items()
        if (name.startswith("ACCELERATE_") or (name in _PROCESSES and not launched)) and name not in kept
    }
    fall_back = "PYTORCH_ENABLE_MPS_FALLBACK"  # the only variable that accelerate itself sets here
    had_fall_back = fall_back in os.environ
    for name in hidden:
        os.environ.pop(name, None)
    try:
        yield
    finally:
        for name, value in hidden.items():
            os.environ.setdefault(name, value)
        if not had_fall_back:
            os.environ.pop(fall_back, None)


def accelerate_precision(precision: str) -> str:
    """accelerate's mixed precision: fp16 for the scaling of its losses; nothing else is accelerate's to cast."""
    return _ACCELERATE[precision]
