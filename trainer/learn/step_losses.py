"""The losses of a step, left on the device until all are read in one transfer, as each transfer waits for a GPU."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch

from ..errors import SubjectBoothError

TOTAL = "loss"
"""Name of the weighted sum of all terms."""


@dataclass(frozen=True)
class PartLosses:
    """The losses of a forward pass.

    Attributes:
        terms: scalars by name, with their weighted sum under :data:`TOTAL`; detached.
        each: the loss of each image, [b].
        labels: the images' names in messages, b.
    """

    terms: Mapping[str, torch.Tensor]
    each: torch.Tensor
    labels: Sequence[str]

    def to(self, device: torch.device) -> PartLosses:
        """The same on ``device``."""
        return PartLosses(_on(self.terms, device), self.each.to(device), self.labels)


class StepLosses:
    """Collects the losses of one step.

    Args:
        accumulate: micro-steps of a step.

    Attributes:
        penalty: terms that depend only on the adapter, as in :attr:`PartLosses.terms`.
    """

    def __init__(self, accumulate: int) -> None:
        self._accumulate = accumulate
        self._parts: list[tuple[int, PartLosses]] = []
        self.penalty: Mapping[str, torch.Tensor] = {}

    def add(self, micro_step: int, part: PartLosses) -> None:
        """Add a part of a micro-step."""
        self._parts.append((micro_step, part))

    @classmethod
    def of_all(cls, processes: Sequence[StepLosses]) -> StepLosses:
        """The losses of a step whose parts several processes computed."""
        whole = cls(processes[0]._accumulate)
        for losses in processes:
            whole._parts += losses._parts
            whole.penalty = whole.penalty or losses.penalty
        return whole

    def to(self, device: torch.device) -> StepLosses:
        """The same on ``device``."""
        moved = StepLosses(self._accumulate)
        moved._parts = [(number, part.to(device)) for number, part in self._parts]
        moved.penalty = _on(self.penalty, device)
        return moved

    @property
    def labels(self) -> list[str]:
        """The names of all images, for messages."""
        return [label for _, part in self._parts for label in part.labels]

    def with_norm(self, norm: torch.Tensor) -> torch.Tensor:
        """All numbers as one vector, float32, with the gradient norm as the last."""
        parts = [tensor for _, part in self._parts for tensor in (*part.terms.values(), part.each)]
        return torch.cat([tensor.view(-1) for tensor in (*parts, *self.penalty.values(), norm)])

    def read(self, values: Sequence[float], step: int) -> tuple[dict[str, float], float]:
        """The losses by name, and the gradient norm.

        A term is averaged over the micro-steps that have it; the total over all of them.

        Args:
            values: the content of :meth:`with_norm`.
            step: steps done before this one.

        Raises:
            SubjectBoothError: the loss of an image is not finite.
        """
        numbers = iter(values)
        sums: dict[str, float] = {}
        micro_steps: dict[str, set[int]] = {}
        for micro_step, part in self._parts:
            _add(sums, {name: next(numbers) / self._accumulate for name in part.terms})
            _stop_if_not_finite(part.labels, [next(numbers) for _ in part.labels], step)
            for name in part.terms:
                micro_steps.setdefault(name, set()).add(micro_step)
        for name, found in micro_steps.items():
            if len(found) < self._accumulate and name != TOTAL:
                sums[name] *= self._accumulate / len(found)
        _add(sums, {name: next(numbers) for name in self.penalty})
        return sums, next(numbers)


def _on(terms: Mapping[str, torch.Tensor], device: torch.device) -> dict[str, torch.Tensor]:
    return {name: term.to(device) for name, term in terms.items()}


def _add(sums: dict[str, float], values: Mapping[str, float]) -> None:
    for name, value in values.items():
        sums[name] = sums.get(name, 0.0) + value


def _stop_if_not_finite(labels: Sequence[str], each: Sequence[float], step: int) -> None:
    wrong = [index for index, loss in enumerate(each) if not abs(loss) < float("inf")]
    if not wrong:
        return
    whose = " and ".join(labels[index] for index in wrong)
    raise SubjectBoothError(
        f"a loss of {each[wrong[0]]:g} at step {step + 1}, on {whose}",
        "finite numbers",
        f"lower the learning rate, or set precision to bf16 or fp32; the adapter of step {step} is kept",
    )
