"""On a CPU the pictures of a step are computed side by side, each thread with its own.

Threads that share out one product wait for each other at its end, some thousand times a step; pictures need not wait
for each other before their gradients are added up.
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
    """How many threads to share *pictures* out to; 1 where they have to stay together.

    On another device the pictures share its one queue. Dropout draws from the random state that all threads have in
    common, and autocast keeps its copies of the weights for all of them.

    Args:
        pictures: of one forward pass.
        chosen: device and precision of the run.
    """
    if chosen.device != "cpu" or chosen.precision != "fp32" or lora_dropout:
        return 1
    return max(1, min(pictures, torch.get_num_threads()))


class SideBySide:
    """Runs functions at the same time. torch's own threads are shared out evenly among the *threads*."""

    def __init__(self, threads: int) -> None:
        self.threads = threads
        self._pool = ThreadPoolExecutor(threads, "subjectbooth step")
        shared = torch.get_num_threads()
        all_started = threading.Barrier(threads)

        def start() -> None:
            torch.get_num_threads()  # when first asked, a thread takes over the process's number
            torch.set_num_threads(max(1, shared // threads))
            all_started.wait()  # without it one thread could take another's start over

        for each in [self._pool.submit(start) for _ in range(threads)]:
            each.result()
        # Setting it has set the process's number too, which later threads start with.
        torch.set_num_threads(shared)

    def run(self, functions: Sequence[Callable[[], T]]) -> list[T]:
        """Their results in their order; when all have ended, the first error in that order is raised."""
        running = [self._pool.submit(function) for function in functions]
        wait(running)
        return [each.result() for each in running]

    def close(self) -> None:
        """End the threads."""
        self._pool.shutdown()
