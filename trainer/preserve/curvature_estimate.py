"""A quadratic estimate of how much a LoRA changes the base's predictions, from the base alone.

Near the base, the mean squared change of its predictions is quadratic in the change ``W`` of the weights. For each
layer, the matrix of this quadratic form is approximated by a Kronecker product (K-FAC, arXiv 1503.05671; against
forgetting, arXiv 1805.07810)::

    change = tr(G W C W^T),   C = mean of x x^T,   G = mean over images of the sum of g g^T

with the layer's inputs ``x`` and the gradients ``g`` of random projections of the prediction with respect to its
outputs, over tokens or pixels. Only a sketch of each matrix is stored (Nyström, arXiv 1706.05736).
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass

import torch

from ..machine.draws import generator_for
from .adapter_layer import AdapterLayer

RANK = 64
"""Columns of a sketch; narrower matrices are stored exactly."""


@dataclass(frozen=True)
class SecondMoment:
    """A positive semi-definite matrix, ``root @ root.T + rest * I``.

    Attributes:
        root: float32 [width, k].
        rest: float32 scalar.
    """

    root: torch.Tensor
    rest: torch.Tensor


class SecondMomentSketch:
    """The sum of ``x x^T`` over many ``x``, as a sketch.

    Args:
        width: length of ``x``.
        device: where it is computed.
    """

    def __init__(self, width: int, device: torch.device) -> None:
        k = min(width, RANK)
        random = torch.randn(width, k, generator=generator_for(0, "sketch", width))
        self._test = (torch.eye(width) if k == width else torch.linalg.qr(random).Q).to(device)
        self._sketch = torch.zeros(width, k, device=device)
        self._trace = torch.zeros((), device=device)

    def add(self, rows: torch.Tensor) -> None:
        """Add ``x x^T`` for each row, [n, width]."""
        rows = rows.float()
        self._sketch += rows.T @ (rows @ self._test)
        self._trace += rows.square().sum()

    def finish(self, factor: float) -> SecondMoment:
        """The sum times ``factor``. What the sketch misses is spread over all directions."""
        sketch, test = self._sketch.cpu().double(), self._test.cpu().double()
        # A small shift keeps the Cholesky factorisation stable (Tropp et al., algorithm 3).
        shift = 1e-5 * float(sketch.norm()) + 1e-30
        sketch = sketch + shift * test
        core = torch.linalg.cholesky(symmetric(test.T @ sketch))
        root = torch.linalg.solve_triangular(core, sketch.T, upper=False).T
        width, k = root.shape
        rest = (float(self._trace) - float(root.square().sum())) / width if k < width else 0.0
        device = self._sketch.device
        return SecondMoment(
            (root * factor**0.5).float().to(device), torch.tensor(max(0.0, rest) * factor, device=device)
        )


def symmetric(matrix: torch.Tensor) -> torch.Tensor:
    """Without the rounding errors that make a symmetric matrix asymmetric."""
    return (matrix + matrix.T) / 2


@dataclass(frozen=True)
class _Group:
    """Layers of equal shape, whose matrices are multiplied in one kernel.

    Attributes:
        numbers: positions of the layers.
        inputs, outputs: roots of C and G, [layers, width, k].
        input_rests, output_rests: [layers, 1, 1].
    """

    numbers: tuple[int, ...]
    inputs: torch.Tensor
    outputs: torch.Tensor
    input_rests: torch.Tensor
    output_rests: torch.Tensor


_TENSORS = ("inputs", "outputs", "input_rests", "output_rests")


class CurvatureEstimate:
    """The estimate for all layers with a LoRA.

    Args:
        groups: the layers, by shape.
        factor: the ratio of a measured change to the uncalibrated estimate. The approximation treats layers and tokens
            as independent, and so underestimates changes that point the same way everywhere.
    """

    def __init__(self, groups: Sequence[_Group], factor: float = 1.0) -> None:
        self._groups, self.factor = tuple(groups), factor

    @classmethod
    def of(cls, inputs: Sequence[SecondMoment], outputs: Sequence[SecondMoment]) -> CurvatureEstimate:
        """The uncalibrated estimate from C and G of each layer, in the order of the layers."""
        together: dict[tuple[torch.Size, torch.Size], list[int]] = {}
        for number, (before, after) in enumerate(zip(inputs, outputs, strict=True)):
            together.setdefault((before.root.shape, after.root.shape), []).append(number)
        return cls(
            [
                _Group(
                    tuple(numbers),
                    torch.stack([inputs[number].root for number in numbers]),
                    torch.stack([outputs[number].root for number in numbers]),
                    torch.stack([inputs[number].rest for number in numbers])[:, None, None],
                    torch.stack([outputs[number].rest for number in numbers])[:, None, None],
                )
                for numbers in together.values()
            ]
        )

    def calibrated(self, factor: float) -> CurvatureEstimate:
        """The same with another factor."""
        return CurvatureEstimate(self._groups, factor)

    def change(self, layers: Sequence[AdapterLayer]) -> torch.Tensor:
        """The estimated mean squared change of the base's predictions, a differentiable scalar.

        Args:
            layers: in the order of the estimate; those of frozen text encoders, at its end, may be missing.
        """
        parts = []
        for group in self._groups:
            chosen = [layers[number] for number in group.numbers if number < len(layers)]
            if not chosen:
                continue
            count = len(chosen)
            down = torch.stack([layer.down.flatten(1) for layer in chosen])
            up = torch.stack([layer.up.flatten(1) for layer in chosen])
            inputs = _quadratic(down, group.inputs[:count], group.input_rests[:count])
            outputs = _quadratic(up.mT, group.outputs[:count], group.output_rests[:count])
            parts.append((inputs * outputs).sum() * chosen[0].scale ** 2)  # all LoRAs have the same scale
        return self.factor * torch.stack(parts).sum()

    def to_tensors(self) -> dict[str, torch.Tensor]:
        """All numbers, for a file."""
        tensors = {"factor": torch.tensor(self.factor, dtype=torch.float64)}
        for place, group in enumerate(self._groups):
            tensors[f"{place}.numbers"] = torch.tensor(group.numbers)
            tensors |= {f"{place}.{name}": getattr(group, name).cpu() for name in _TENSORS}
        return tensors

    @classmethod
    def from_tensors(cls, tensors: Mapping[str, torch.Tensor], device: torch.device) -> CurvatureEstimate:
        """The inverse of :meth:`to_tensors`."""
        groups: list[_Group] = []
        while (numbers := tensors.get(f"{len(groups)}.numbers")) is not None:
            values = [tensors[f"{len(groups)}.{name}"].to(device) for name in _TENSORS]
            groups.append(_Group(tuple(numbers.tolist()), *values))
        return cls(groups, float(tensors["factor"]))


def estimate_bytes(shapes: Iterable[tuple[int, int]]) -> int:
    """Memory that the estimate takes for layers with these numbers of outputs and inputs."""
    return sum(4 * (width * min(width, RANK) + 1) for shape in shapes for width in shape)


def _quadratic(rows: torch.Tensor, root: torch.Tensor, rest: torch.Tensor) -> torch.Tensor:
    """``rows (root root^T + rest I) rows^T``, [layers, rank, rank], for rows [layers, rank, width]."""
    projected = rows @ root
    return projected @ projected.mT + rest * (rows @ rows.mT)
