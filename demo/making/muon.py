"""Muon (Keller Jordan et al. 2024, https://kellerjordan.github.io/posts/muon): updates are orthogonalised.

For the weights of inner layers. torch's implementation only supports matrices, but most weights of a UNet are
convolutions. Here each process orthogonalises its share of the weights, because that takes about a third of a step.
"""

from __future__ import annotations

from collections.abc import Iterable

import torch

from . import parallel

COEFFICIENTS = (3.4445, -4.7750, 2.0315)
"""Coefficients of the quintic Newton-Schulz iteration, from the page above: the fastest that converges to near 1."""


def orthogonalised(matrices: torch.Tensor, iterations: int = 5) -> torch.Tensor:
    """float32 [n, rows, columns] -> the same shape with all singular values near 1 (0.7 to 1.2).

    Each iteration is a polynomial in x x^T, so all are computed on that smaller square matrix, and x is multiplied only
    once: half the time for a UNet's weights, with a difference of at most 3e-4.
    """
    a, b, c = COEFFICIENTS
    tall = matrices.shape[1] > matrices.shape[2]
    x = matrices.mT if tall else matrices
    x = x / (x.norm(dim=(1, 2), keepdim=True) + 1e-7)
    gram = x @ x.mT
    whole = identity = torch.eye(x.shape[1]).to(x)
    for _ in range(iterations):
        polynomial = a * identity + b * gram + c * gram @ gram
        whole = polynomial @ whole
        gram = polynomial @ gram @ polynomial
    x = whole @ x
    return x.mT if tall else x


class Muon(torch.optim.Optimizer):
    """Orthogonalised Nesterov momentum, scaled by 0.2 x sqrt(larger side), so that updates are as large as AdamW's.

    With that scale (Moonshot AI 2025, arXiv 2502.16982), AdamW's learning rate and weight decay can be used.
    Convolutions [out, in, h, w] are treated as matrices [out, in * h * w]. With `torch.distributed`, the gradients must
    be equal in all processes.
    """

    def __init__(
        self,
        parameters: Iterable[torch.Tensor],
        lr: float,
        momentum: float = 0.95,
        weight_decay: float = 0.01,
        rank: int = 0,
        world: int = 1,
    ) -> None:
        super().__init__(parameters, {"lr": lr, "momentum": momentum, "weight_decay": weight_decay})
        self.rank, self.world = rank, world

    @torch.no_grad()
    def step(self, closure: None = None) -> None:  # type: ignore[override]
        """Update every parameter that has a gradient."""
        for group in self.param_groups:
            by_shape: dict[tuple[int, int], list[torch.Tensor]] = {}
            for p in group["params"]:
                if p.grad is not None:
                    by_shape.setdefault((len(p), p[0].numel()), []).append(p)
            steps = []
            for shape, alike in by_shape.items():
                matrices = [self._momentum(p, group["momentum"]).reshape(shape) for p in alike]
                steps.append(self._directions(torch.stack(matrices)))
            parallel.add_up(steps, self.world)
            for (shape, alike), directions in zip(by_shape.items(), steps, strict=True):
                for p, direction in zip(alike, directions, strict=True):
                    p.mul_(1 - group["lr"] * group["weight_decay"])
                    p.add_(direction.view_as(p), alpha=-group["lr"] * 0.2 * max(shape) ** 0.5)

    def _momentum(self, p: torch.Tensor, momentum: float) -> torch.Tensor:
        """Nesterov momentum: the running mean of the gradients, one step ahead."""
        assert p.grad is not None
        buffer: torch.Tensor = self.state[p].setdefault("momentum", torch.zeros_like(p))
        buffer.lerp_(p.grad, 1 - momentum)
        return p.grad.lerp(buffer, momentum)

    def _directions(self, matrices: torch.Tensor) -> torch.Tensor:
        """The orthogonalised matrices of this process's share, zeros for the others."""
        directions = torch.zeros_like(matrices)
        directions[self.rank :: self.world] = orthogonalised(matrices[self.rank :: self.world])
        return directions
