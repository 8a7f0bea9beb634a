"""The machine a run finds itself on: device, precision, and accelerate without its process-wide leftovers."""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager

import torch

from .config import AUTO, TrainConfig
from .errors import require

DTYPES = {"fp32": torch.float32, "fp16": torch.float16, "bf16": torch.bfloat16}
_ACCELERATE = {"fp32": "no", "fp16": "fp16", "bf16": "bf16"}


def choose(
    config: TrainConfig, device: torch.device, kept: str | None = None,
) -> tuple[dict[str, str], tuple[str, ...]]:
    """Device and precision, and sentences about what had to be changed. :mod:`trainer.plan` chooses what else is auto.

    Half precision is not used on a CPU: it is right there but hundreds of times slower.

    Args:
        config: the requested settings.
        device: where to train.
        kept: the precision that a resumed run had, perhaps on another machine.
    """
    notes: list[str] = []
    precision = kept or config.precision
    if precision == AUTO:
        precision = "fp32"
        if device.type == "cuda":
            precision = "bf16" if torch.cuda.is_bf16_supported(including_emulation=False) else "fp16"
    elif precision == "fp16" and device.type == "cpu":
        precision = "fp32"
        notes.append("precision fp16 needs a GPU; this run uses fp32")
    return {"device": str(device), "precision": precision}, tuple(notes)


@contextmanager
def isolated_accelerate() -> Iterator[None]:
    """Give accelerate a clean start, and put back whatever state other packs had made in this process.

    Its ``Accelerator`` keeps one state for the whole process, so a second run with another precision would meet the
    first one's.
    """
    require("accelerate")
    from accelerate.state import AcceleratorState, GradientState, PartialState

    singletons = (PartialState, AcceleratorState, GradientState)
    before = [dict(single._shared_state) for single in singletons]
    environment = dict(os.environ)
    try:
        for single in singletons:
            single._shared_state.clear()
        yield
    finally:
        for single, state in zip(singletons, before, strict=True):
            single._shared_state.clear()
            single._shared_state.update(state)
        for name in set(os.environ) - set(environment):
            del os.environ[name]
        os.environ.update(environment)


def accelerate_precision(precision: str) -> str:
    """accelerate's word for a precision of ours."""
    return _ACCELERATE[precision]
