"""On a CPU, the images of a step are computed in parallel, one thread per image.

Threads that share one matrix product have to synchronise after it, some thousand times a step; images only when their
gradients are added.
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor, wait
from typing import TypeVar

import torch

from ..machine.resolved_settings import ResolvedSettings

T = TypeVar("T")


def threads_for(pictures: int, chosen: ResolvedSettings, lora_dropout: float) -> int:
    """The number of threads for a forward pass; 1 if its images must be computed together.

    That is the case on other devices, which have one queue; with dropout, whose random state is global; and with
    autocast, whose cache of weights is shared by all threads.

    Args:
        pictures: images in one forward pass.
        chosen: device and precision of the run.
    """
    if chosen.device != "cpu" or chosen.precision != "fp32" or lora_dropout:
        return 1
    return max(1, min(pictures, torch.get_num_threads()))


class SideBySide:
    """Runs functions in parallel. torch's own threads are divided equally between the ``threads``."""

    def __init__(self, threads: int) -> None:
        self.threads = threads
        self._pool = ThreadPoolExecutor(threads, "subjectbooth step")
        shared = torch.get_num_threads()
        all_started = threading.Barrier(threads)

        def start() -> None:
            torch.get_num_threads()  # a thread adopts the process's number at its first call
            torch.set_num_threads(max(1, shared // threads))
            all_started.wait()  # otherwise one thread could run another's start, too

        for each in [self._pool.submit(start) for _ in range(threads)]:
            each.result()
        # Setting it also changed the process's number, which later threads start with.
        torch.set_num_threads(shared)

    def run(self, functions: Sequence[Callable[[], T]]) -> list[T]:
        """Results in the order of the functions; the first error in that order is raised after all have ended."""
        running = [self._pool.submit(function) for function in functions]
        wait(running)
        return [each.result() for each in running]

    def close(self) -> None:
        """Stop the threads."""
        self._pool.shutdown()
