"""A step of several processes: gradients are added up, losses collected, and what happens to one happens to all."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import NamedTuple

import torch
from torch import nn

from ..machine.out_of_memory import is_out_of_memory
from ..machine.processes import Processes
from .step_losses import StepLosses


class _Part(NamedTuple):
    """What a process did of a step.

    Attributes:
        losses: on the CPU; None after a failure.
        trained: for each parameter, whether it has a gradient.
        out_of_memory: whether memory ran out.
        failure: of another kind, after which all can try again; empty for none.
    """

    losses: StepLosses | None
    trained: list[bool]
    out_of_memory: bool
    failure: str


def reduced(
    processes: Processes,
    parameters: Sequence[nn.Parameter],
    compute: Callable[[], StepLosses],
    tries_again: bool = False,
) -> StepLosses:
    """The losses of all processes, whose gradients are added up in the parameters of each.

    Args:
        parameters: in the same order in all processes. One without a gradient in any process, such as those of CLIP's
            last layer where it is not used, keeps none.
        compute: accumulates the gradients of this process's part, and returns its losses.
        tries_again: whether all processes can try the step again after any failure.

    Raises:
        ProcessEnded: another process has failed.
        MemoryError: one ran out of memory; all can try again with less.
        RuntimeError: one has failed in another way, after which all can try again.
    """
    losses: StepLosses | None = None
    out_of_memory, failure = False, ""
    try:
        losses = compute().to(torch.device("cpu"))
    except Exception as error:
        out_of_memory = is_out_of_memory(error)
        if not (out_of_memory or tries_again):
            raise
        failure = "" if out_of_memory else f"{type(error).__name__}: {error}"
    trained = [parameter.grad is not None for parameter in parameters]
    parts = processes.exchange(_Part(losses, trained, out_of_memory, failure))
    if any(part.out_of_memory for part in parts):
        raise MemoryError("a process ran out of memory")
    for part in parts:
        if part.failure:
            raise RuntimeError(part.failure)
    gradients = []
    for number, parameter in enumerate(parameters):
        if any(part.trained[number] for part in parts):
            if parameter.grad is None:
                parameter.grad = torch.zeros_like(parameter)
            gradients.append(parameter.grad)
    processes.add_up(gradients)
    return StepLosses.of_all([part.losses for part in parts if part.losses is not None]).to(parameters[0].device)
