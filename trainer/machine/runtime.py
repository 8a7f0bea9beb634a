"""The machine a run finds itself on: device, precision, and accelerate without its process-wide leftovers."""

from __future__ import annotations

import os
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch

from ..config import AUTO, TrainConfig
from ..errors import require

_ACCELERATE = {"fp32": "no", "fp16": "fp16", "bf16": "bf16"}


def choose_precision(config: TrainConfig, device: torch.device, kept: str | None = None) -> tuple[str, tuple[str, ...]]:
    """The precision, and sentences about what had to be changed. :mod:`trainer.memory.plan` chooses what else is auto.

    Half precision is not used on a CPU: it is right there but hundreds of times slower.

    Args:
        config: the requested settings.
        device: where to train.
        kept: the precision that a resumed run had, perhaps on another machine.
    """
    precision = kept or config.precision
    if precision == AUTO:
        if device.type != "cuda":
            return "fp32", ()
        return "bf16" if torch.cuda.is_bf16_supported(including_emulation=False) else "fp16", ()
    if precision == "fp16" and device.type == "cpu":
        return "fp32", ("precision fp16 needs a GPU; this run uses fp32",)
    return precision, ()


class IsolatedAccelerate:
    """A run's own copy of what accelerate keeps for the whole process.

    An ``Accelerator`` has its state in common with every other one in the process, and reads further settings from the
    environment: a run of another precision, another pack or a line in a shell's profile would decide how this one
    trains. So objects of accelerate are made inside :meth:`installed`; they keep the state they were made with, and
    other packs keep theirs, those that they change while a run goes on included.

    Args:
        device: where to train. None: where accelerate says, which under ``accelerate launch`` is told by the
            environment.
    """

    def __init__(self, device: torch.device | None) -> None:
        require("accelerate")
        from accelerate.state import AcceleratorState, GradientState, PartialState

        self._states: dict[Any, dict[str, Any]] = {PartialState: {}, AcceleratorState: {}, GradientState: {}}
        self._launched = device is None

    @contextmanager
    def installed(self) -> Iterator[None]:
        """Inside, accelerate finds this run's state and nothing of it in the environment. A few milliseconds only: the
        whole process shares both."""
        with _installing, _without_settings(self._launched):
            # The attribute itself and not its content: the objects of other packs have their dict for themselves.
            before = {kind: kind.__dict__["_shared_state"] for kind in self._states}
            for kind, state in self._states.items():
                kind._shared_state = state
            try:
                yield
            finally:
                for kind, state in before.items():
                    kind._shared_state = state

    def device(self) -> torch.device:
        """Where accelerate would train."""
        from accelerate.state import PartialState

        cpu = os.environ.get("ACCELERATE_USE_CPU", "").lower() in ("1", "true", "yes", "y", "t", "on")
        with self.installed():
            return PartialState(cpu=cpu).device


def default_device() -> torch.device:
    """Where a run trains that is not told where."""
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
"""What tells a process that it is one of several; inside ComfyUI, left over from something else."""


@contextmanager
def _without_settings(launched: bool) -> Iterator[None]:
    """Inside, the environment has none of accelerate's settings. What others change meanwhile stays changed.

    Args:
        launched: leave in place what ``accelerate launch`` says about processes and the device.
    """
    kept = ("ACCELERATE_TORCH_DEVICE",) if launched else ()
    hidden = {
        name: value
        for name, value in os.environ.items()
        if (name.startswith("ACCELERATE_") or (name in _PROCESSES and not launched)) and name not in kept
    }
    fall_back = "PYTORCH_ENABLE_MPS_FALLBACK"  # the one thing that accelerate sets here
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
    """accelerate's word for a precision of ours."""
    return _ACCELERATE[precision]
