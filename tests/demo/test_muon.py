"""Muon: its steps are orthogonal, as large as AdamW's, and one process makes what several share out among them."""

from __future__ import annotations

import pytest
import torch

from subjectbooth.demo.making.muon import Muon, orthogonalised


@pytest.mark.parametrize("shape", [(3, 16, 40), (2, 40, 16)])
def test_singular_values_end_near_one_and_vectors_stay(shape: tuple[int, int, int]) -> None:
    torch.manual_seed(0)
    matrices = torch.randn(shape)
    made = orthogonalised(matrices)
    values = torch.linalg.svdvals(made)
    assert values.min() > 0.6 and values.max() < 1.3
    left, _, right = torch.linalg.svd(matrices, full_matrices=False)
    # In the basis of the matrices' own singular vectors the result is diagonal: only the values changed.
    inner = left.mT @ made @ right.mT
    assert (inner - torch.diag_embed(inner.diagonal(dim1=1, dim2=2))).abs().max() < 1e-4


def test_a_step_is_as_large_as_adamws() -> None:
    torch.manual_seed(0)
    weight = torch.nn.Parameter(torch.zeros(64, 24, 3, 3))
    weight.grad = torch.randn_like(weight)
    Muon([weight], lr=1e-3, weight_decay=0).step()
    root_mean_square = float(weight.detach().square().mean().sqrt())
    assert 0.14e-3 < root_mean_square < 0.26e-3, "0.2 of the learning rate"


def test_momentum_and_decay_are_those_of_the_formula() -> None:
    """Two steps by hand for one matrix."""
    torch.manual_seed(2)
    weight = torch.nn.Parameter(torch.randn(6, 10))
    expected, buffer = weight.detach().clone(), torch.zeros(6, 10)
    optimizer = Muon([weight], lr=0.1, momentum=0.9, weight_decay=0.5)
    for _ in range(2):
        gradient = torch.randn(6, 10)
        weight.grad = gradient.clone()
        optimizer.step()
        buffer = 0.9 * buffer + 0.1 * gradient
        direction = orthogonalised((0.1 * gradient + 0.9 * buffer)[None])[0]
        expected = expected * (1 - 0.1 * 0.5) - 0.1 * 0.2 * 10**0.5 * direction
    torch.testing.assert_close(weight.detach(), expected, rtol=1e-5, atol=1e-6)


def test_shares_of_two_processes_make_up_the_whole() -> None:
    """The sum over both ranks' directions, each without the other, is what one process makes alone."""
    matrices = torch.randn(5, 4, 9)
    weight = torch.nn.Parameter(torch.zeros(1, 1))
    shares = [Muon([weight], 1.0, rank=rank, world=2)._directions(matrices) for rank in (0, 1)]
    torch.testing.assert_close(shares[0] + shares[1], orthogonalised(matrices))
    assert all((share == 0).flatten(1).all(1).any() for share in shares)
