"""The running average of all layers at once has the bits of one layer after the other."""

from __future__ import annotations

import pytest
import torch

from subjectbooth.trainer.learn.ema import AdapterAverage

SHAPES = [(4, 320), (), (1,), (0, 3), (3, 5, 7), (1281, 4), (17, 3, 1, 1), (2, 65_537)]


def _parameters(random: torch.Generator) -> list[torch.nn.Parameter]:
    made = [torch.nn.Parameter(torch.randn(shape, generator=random)) for shape in SHAPES]
    turned = torch.nn.Parameter(torch.randn(6, 9, generator=random).t())
    assert not turned.is_contiguous()
    return [*made, turned]


@pytest.mark.parametrize("decay", [0.3, 0.999])
def test_it_is_the_definition_bit_by_bit(decay: float) -> None:
    random = torch.Generator().manual_seed(0)
    parameters = _parameters(random)
    average = AdapterAverage(parameters, decay)
    expected = [parameter.detach().clone() for parameter in parameters]
    for step in range(12):  # the weight is above and below 1/2, where torch writes the formula another way round
        with torch.no_grad():
            for parameter in parameters:
                parameter += torch.randn(parameter.shape, generator=random) * 10.0**-step
        average.update(step)
        for each, parameter in zip(expected, parameters, strict=True):
            each.lerp_(parameter.detach(), 1.0 - min(decay, (1 + step) / (10 + step)))
        assert all(map(torch.equal, average.average, expected))
    assert not any(each.requires_grad for each in average.average)


def test_weights_are_put_back_bit_by_bit_even_after_an_error() -> None:
    parameters = _parameters(torch.Generator().manual_seed(1))
    average = AdapterAverage(parameters, 0.9)
    with torch.no_grad():
        for parameter in parameters:
            parameter.mul_(1.7)
    average.update(0)
    own = [parameter.detach().clone() for parameter in parameters]
    with pytest.raises(KeyError), average.applied():
        assert all(map(torch.equal, parameters, average.average))
        assert not torch.equal(parameters[0], own[0])
        raise KeyError
    assert all(map(torch.equal, parameters, own))
    assert all(parameter.requires_grad and parameter.is_leaf for parameter in parameters)
