"""Muon (Keller Jordan et al. 2024, https://kellerjordan.github.io/posts/muon): steps along the nearest orthogonal
matrix.

For the weights of inner layers. torch's own takes matrices only, and most of a UNet's weights are convolutions; and
here each process orthogonalises its share of the weights, because that costs about a third of a step.
"""

from __future__ import annotations

from collections.abc import Iterable

import torch
import torch.distributed as dist

COEFFICIENTS = (3.4445, -4.7750, 2.0315)
"""Of the quintic Newton-Schulz iteration, from the page above: the steepest at zero that still ends near 1."""


def orthogonalised(matrices: torch.Tensor, iterations: int = 5) -> torch.Tensor:
    """float32 [n, rows, columns] -> the same shape with all singular values near 1 (0.7 to 1.2)."""
    a, b, c = COEFFICIENTS
    tall = matrices.shape[1] > matrices.shape[2]
    x = matrices.mT if tall else matrices
    x = x / (x.norm(dim=(1, 2), keepdim=True) + 1e-7)
    for _ in range(iterations):
        gram = x @ x.mT
        x = a * x + (b * gram + c * gram @ gram) @ x
    return x.mT if tall else x


class Muon(torch.optim.Optimizer):
    """Nesterov momentum, orthogonalised, at 0.2 x sqrt(larger side), so that a step is as large as one of AdamW's.

    That scale (Moonshot AI 2025, arXiv 2502.16982) lets AdamW's learning rate and weight decay stand. Convolutions
    [out, in, h, w] count as matrices [out, in * h * w]. Under `torch.distributed` the gradients must be the same in
    every process.
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
        """One step of every parameter that has a gradient."""
        for group in self.param_groups:
            by_shape: dict[tuple[int, int], list[torch.Tensor]] = {}
            for p in group["params"]:
                if p.grad is None:
                    continue
                buffer = self.state[p].setdefault("momentum", torch.zeros_like(p))
                buffer.lerp_(p.grad, 1 - group["momentum"])
                matrix = p.grad.lerp(buffer, group["momentum"]).reshape(len(p), -1)
                by_shape.setdefault((matrix.shape[0], matrix.shape[1]), []).append(matrix)
                p.mul_(1 - group["lr"] * group["weight_decay"])
            steps = {shape: self._directions(torch.stack(found)) for shape, found in by_shape.items()}
            self._exchange(list(steps.values()))
            taken = dict.fromkeys(steps, 0)
            for p in group["params"]:
                if p.grad is None:
                    continue
                shape = (len(p), p[0].numel())
                direction = steps[shape][taken[shape]].view_as(p)
                p.add_(direction, alpha=-group["lr"] * 0.2 * max(shape) ** 0.5)
                taken[shape] += 1

    def _directions(self, matrices: torch.Tensor) -> torch.Tensor:
        """The orthogonalised matrices of this process's share, zeros for the others."""
        directions = torch.zeros_like(matrices)
        directions[self.rank :: self.world] = orthogonalised(matrices[self.rank :: self.world])
        return directions

    def _exchange(self, parts: list[torch.Tensor]) -> None:
        """Fill in what the other processes made."""
        if self.world == 1 or not parts:
            return
        flat = torch.cat([part.reshape(-1) for part in parts])
        dist.all_reduce(flat)
        at = 0
        for part in parts:
            part.copy_(flat[at : at + part.numel()].view_as(part))
            at += part.numel()
