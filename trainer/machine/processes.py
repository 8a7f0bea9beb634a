"""The processes of one training: those that ``accelerate launch`` or ``torchrun`` started, or this one alone.

The processes of a step are like its micro-batches: each computes a part of one batch, and gradients and losses are
added up. Everything that they have to agree on goes through :meth:`Processes.exchange`, over gloo, so that a process
that fails or is interrupted can tell the others, whatever it was to exchange with them.
"""

from __future__ import annotations

import datetime
import os
import signal
import threading
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, suppress
from types import FrameType
from typing import Any, TypeVar

import torch

from ..errors import SubjectBoothError

T = TypeVar("T")

PROMPTLY = datetime.timedelta(minutes=1)
"""How long a sum on GPUs may take. All processes have just exchanged values, so none has anything else to do."""

SILENCE = datetime.timedelta(hours=1)
"""How long a process may take, for example to draw validation images, before the others give it up. That a process was
killed is noticed at once, because its connections are closed."""

_SIGNALS = tuple(getattr(signal, name) for name in ("SIGINT", "SIGTERM", "SIGHUP") if hasattr(signal, name))


class ProcessEnded(SubjectBoothError):
    """Another process of the training has ended.

    Attributes:
        was_killed: whether it ended without a message.
    """

    def __init__(self, given: str, was_killed: bool) -> None:
        super().__init__(
            given,
            "all processes of the training",
            "run the same command again: it resumes from the last saved step",
        )
        self.was_killed = was_killed


class Processes:
    """This process among those of a training. The first one writes and draws; by default it is the only one.

    Attributes:
        rank: its number, from 0.
        count: number of processes.
        device: where it trains; None if it is the only one.
    """

    rank = 0
    count = 1
    device: torch.device | None = None

    @property
    def is_main(self) -> bool:
        """Whether this process writes files, draws validation images and prints."""
        return self.rank == 0

    def share(self, count: int) -> tuple[int, int]:
        """The first of ``count`` things that this process does, and the end of its part."""
        return count * self.rank // self.count, count * (self.rank + 1) // self.count

    def exchange(self, value: T) -> list[T]:
        """The values of all processes, by rank.

        Raises:
            ProcessEnded: one has failed or was killed.
        """
        return [value]

    def from_main(self, compute: Callable[[], T]) -> T:
        """What the main process computes, which the others wait for."""
        return compute()

    def add_up(self, tensors: Sequence[torch.Tensor]) -> None:
        """Replace tensors by their sums over the processes."""

    def free(self, bytes_free: int | None) -> int | None:
        """The memory that every process can count on, so that all plan the same."""
        return bytes_free


class _Several(Processes):
    def __init__(self, rank: int, count: int, neighbours: int) -> None:
        self.rank, self.count, self._neighbours = rank, count, neighbours
        self._ended = False
        self._group: Any = None
        try:
            torch.distributed.init_process_group("gloo", rank=rank, world_size=count, timeout=SILENCE)
        except (RuntimeError, ValueError) as error:
            where = f"{os.environ['MASTER_ADDR']}:{os.environ['MASTER_PORT']}"
            raise SubjectBoothError(
                f"process {rank + 1} of {count} cannot connect to the others at {where} ({error})",
                "an address that all processes can reach",
                "see whether another training uses this port, and set GLOO_SOCKET_IFNAME to the network interface "
                "if a machine has several",
                "accelerate launch",
            ) from error

    def train_on(self, device: torch.device) -> None:
        """Set the device of this process; all processes call it."""
        self.device = device
        kinds = self.exchange(device.type)
        if set(kinds) == {"cuda"} and torch.distributed.is_nccl_available():
            self._group = torch.distributed.new_group(backend="nccl", timeout=PROMPTLY)

    def exchange(self, value: T) -> list[T]:
        found = self._gathered(("", value))
        for rank, (problem, _) in enumerate(found):
            if problem:
                self._end(f"process {rank + 1} of {self.count} has stopped: {problem}", False)
        return [other for _, other in found]

    def from_main(self, compute: Callable[[], T]) -> T:
        value = [compute() if self.is_main else None]
        self.exchange(None)  # nobody has stopped; a checkpoint is too large to be gathered from each
        with self._connected():
            torch.distributed.broadcast_object_list(value, 0)
        return value[0]  # type: ignore[return-value]

    def add_up(self, tensors: Sequence[torch.Tensor]) -> None:
        if not tensors:
            return
        flat = torch.cat([tensor.reshape(-1) for tensor in tensors])
        with self._connected():
            if self._group is None:
                on_cpu = flat.cpu()
                torch.distributed.all_reduce(on_cpu)
                flat.copy_(on_cpu)
            else:
                torch.distributed.all_reduce(flat, group=self._group)
        parts = flat.split([tensor.numel() for tensor in tensors])
        torch._foreach_copy_(list(tensors), [p.view_as(t) for p, t in zip(parts, tensors, strict=True)])

    def free(self, bytes_free: int | None) -> int | None:
        assert self.device is not None
        if bytes_free is not None and self.device.type == "cpu":
            bytes_free //= self._neighbours
        known = [value for value in self.exchange(bytes_free) if value is not None]
        return min(known) if known else None

    def leave(self, error: BaseException | None) -> None:
        """Tell the others why this process stops, and wait until all of them have saved what they have."""
        with suppress(ProcessEnded, KeyboardInterrupt):
            if error is not None and not self._ended:
                self._gathered((_reason(error), None))
            self._gathered(("", None))
        torch.distributed.destroy_process_group()

    def _gathered(self, value: Any) -> list[Any]:
        found: list[Any] = [None] * self.count
        with self._connected():
            torch.distributed.all_gather_object(found, value)
        return found

    @contextmanager
    def _connected(self) -> Iterator[None]:
        """A lost connection becomes a :class:`ProcessEnded`. Signals wait for the end of the block, so that a process
        that is interrupted has taken part either completely or not at all."""
        with _signals_later():
            try:
                yield
            except RuntimeError as error:
                self._end(f"a process of the {self.count} was killed or has lost its connection", True, error)

    def _end(self, given: str, was_killed: bool, cause: BaseException | None = None) -> None:
        self._ended = True
        if threading.current_thread() is threading.main_thread():
            # The launcher now terminates the processes that are left, which are about to save.
            for number in _SIGNALS[1:]:
                signal.signal(number, signal.SIG_IGN)
        raise ProcessEnded(given, was_killed) from cause


def _reason(error: BaseException) -> str:
    if isinstance(error, KeyboardInterrupt):
        return "it was interrupted"
    return str(error) or type(error).__name__


_current = Processes()


def current() -> Processes:
    """The processes of the training that runs in this process."""
    return _current


def launched() -> int:
    """The number of processes that a launcher started, from its environment variables; 1 if some are missing."""
    if not all(os.environ.get(name) for name in ("RANK", "MASTER_ADDR", "MASTER_PORT")):
        return 1
    value = os.environ.get("WORLD_SIZE", "1")
    return int(value) if value.isdigit() else 1


def launched_rank() -> int:
    """The number of this process among them, from 0."""
    return int(os.environ.get("RANK", "0")) if launched() > 1 else 0


@contextmanager
def joined(cpu: bool = False) -> Iterator[Processes]:
    """Take part in the training of the processes that a launcher started. At the end, wait for the others.

    Args:
        cpu: train on the CPU.

    Raises:
        SubjectBoothError: there are more processes than GPUs.
    """
    global _current
    if launched() == 1:
        yield _current
        return
    environment = os.environ
    local, neighbours = int(environment.get("LOCAL_RANK", "0")), int(environment.get("LOCAL_WORLD_SIZE", "1"))
    several = _Several(launched_rank(), launched(), neighbours)
    _current = several
    error: BaseException | None = None
    try:
        several.train_on(_device(local, neighbours, cpu))
        yield several
    except BaseException as failure:
        error = failure
        raise
    finally:
        _current = Processes()
        several.leave(error)


def _device(local: int, neighbours: int, cpu: bool) -> torch.device:
    wanted = cpu or os.environ.get("ACCELERATE_USE_CPU", "").lower() in ("1", "true", "yes", "y", "t", "on")
    if wanted or not torch.cuda.is_available():
        return torch.device("cpu")
    found = torch.cuda.device_count()
    if local >= found:
        raise SubjectBoothError(
            f"{neighbours} processes on a machine with {found} GPU{'s' * (found > 1)}",
            "a GPU for each process",
            f"use --num_processes {found} for each machine",
            "accelerate launch",
        )
    device = torch.device("cuda", local)
    torch.cuda.set_device(device)
    return device


@contextmanager
def _signals_later() -> Iterator[None]:
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    came: list[tuple[int, FrameType | None]] = []
    before = {number: signal.getsignal(number) for number in _SIGNALS}
    for number in _SIGNALS:
        if before[number] is not signal.SIG_IGN:
            signal.signal(number, lambda number, frame: came.append((number, frame)))
    try:
        yield
    finally:
        for number in _SIGNALS:
            # Ignored within the block: that holds from now on.
            if signal.getsignal(number) is not signal.SIG_IGN and before[number] is not None:
                signal.signal(number, before[number])
    for number, frame in came:
        handler = before[number]
        if callable(handler):
            handler(number, frame)
        elif handler is signal.SIG_DFL:
            signal.raise_signal(number)
