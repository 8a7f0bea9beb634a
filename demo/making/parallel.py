"""Data-parallel training in several single-threaded processes that average their gradients once per step.

On a shared machine this is much faster than one process with several threads, which synchronise at every operation,
hundreds of times per step.
"""

from __future__ import annotations

import logging
import os
import tempfile
import time
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
import torch.multiprocessing as mp


def _worker(rank: int, world: int, meeting: str, job: Callable[..., None], args: tuple[Any, ...]) -> None:
    torch.set_num_threads(1)
    logging.basicConfig(level=logging.INFO, format="%(asctime)s %(message)s")
    dist.init_process_group("gloo", init_method=Path(meeting).as_uri(), rank=rank, world_size=world)
    try:
        job(rank, world, *args)
    finally:
        dist.destroy_process_group()


def run(job: Callable[..., None], world: int, *args: Any) -> None:
    """Run *job*(rank, world, *args) in *world* processes. *job* must be a module-level function."""
    os.environ["OMP_NUM_THREADS"] = "1"
    with tempfile.TemporaryDirectory() as folder:
        meeting = str(Path(folder) / "meeting")
        mp.spawn(_worker, (world, meeting, job, args), nprocs=world, join=True)  # type: ignore[no-untyped-call]


def add_up(tensors: Sequence[torch.Tensor], world: int) -> None:
    """Replace each tensor by its sum over all processes, with one all-reduce."""
    if world == 1 or not tensors:
        return
    flat = torch.cat([tensor.reshape(-1) for tensor in tensors])
    dist.all_reduce(flat)
    for tensor, summed in zip(tensors, flat.split([tensor.numel() for tensor in tensors]), strict=True):
        tensor.copy_(summed.view_as(tensor))


def average_gradients(parameters: Iterable[torch.nn.Parameter], world: int) -> None:
    """Replace each gradient by its mean over all processes."""
    gradients = [p.grad for p in parameters if p.grad is not None]
    add_up(gradients, world)
    for gradient in gradients:
        gradient /= world


def share_done(step: int, seconds: float, steps: int, minutes: float | None) -> float:
    """Progress of a run, 0..1: by *steps*, or by *minutes* if given, so that it ends in time on any machine."""
    return min(1.0, step / steps if minutes is None else seconds / 60 / minutes)


class Clock:
    """Progress of a run (:func:`share_done`), equal in all processes."""

    def __init__(self, steps: int, minutes: float | None, spent: float = 0.0) -> None:
        self.steps, self.minutes, self.spent = steps, minutes, spent
        self._started = time.monotonic()

    def seconds(self) -> float:
        """Training time in seconds, including earlier sessions."""
        return self.spent + time.monotonic() - self._started

    def progress(self, step: int) -> float:
        """The fraction done, by the clock of the first process."""
        fraction = share_done(step, self.seconds(), self.steps, self.minutes)
        agreed = torch.tensor([fraction], dtype=torch.float64)
        dist.broadcast(agreed, 0)
        return float(agreed)
