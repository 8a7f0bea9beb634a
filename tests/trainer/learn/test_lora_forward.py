"""The layers with a LoRA compute what PEFT's compute, with a cast for all of them instead of some for each."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from torch import nn

from subjectbooth.benchmarks.counting import Dispatched
from subjectbooth.trainer.config import TrainConfig
from subjectbooth.trainer.learn import adapter

BF16 = torch.bfloat16


class _Layers(nn.Module):
    """Three linear layers and a 1x1 convolution, one after the other."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.second, self.third = (nn.Linear(8, 8, bias=number > 0) for number in range(3))
        self.pixels = nn.Conv2d(8, 8, 1)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        rows = self.third(torch.tanh(self.second(torch.tanh(self.first(x)))))
        return self.pixels(rows.transpose(1, 2)[..., None])


def _made(dtype: torch.dtype = torch.float32, **changes: Any) -> tuple[_Layers, list[nn.Parameter]]:
    """With a LoRA that is not zero."""
    with torch.random.fork_rng():
        torch.manual_seed(1)
        module = _Layers().to(dtype).requires_grad_(False)
        layers = {name: layer for name, layer in module.named_children()}
        config = TrainConfig(**{"rank": 4, "network_alpha": 4.0, **changes})
        parameters = adapter.inject(module, config, layers, dtype)
        with torch.no_grad():
            for parameter in parameters:
                parameter.copy_(torch.randn(parameter.shape) * 0.3)
    return module, parameters


def _as_peft(module: nn.Module) -> None:
    module._forward_pre_hooks.clear()
    module._forward_hooks.clear()
    for layer in adapter.lora_layers(module):
        layer.__class__ = type(layer).__mro__[2]
        assert layer.__class__.__module__.startswith("peft")


def _learned(module: nn.Module, parameters: list[nn.Parameter], x: torch.Tensor) -> list[torch.Tensor]:
    """The output and all gradients."""
    x = x.clone().requires_grad_(True)
    output = module(x)
    output.float().square().sum().backward()
    gradients = [parameter.grad.clone() for parameter in parameters if parameter.grad is not None]
    assert x.grad is not None and len(gradients) == len(parameters)
    for parameter in parameters:
        parameter.grad = None
    return [output.detach(), x.grad, *gradients]


@pytest.mark.parametrize("changes", [{}, {"network_alpha": 3.0}, {"lora_dropout": 0.5}])
def test_in_float32_the_bits_are_pefts(changes: dict[str, Any]) -> None:
    (module, parameters), x = _made(**changes), torch.randn(2, 3, 8)
    found = []
    for swap in (False, True):
        if swap:
            _as_peft(module)
        torch.manual_seed(0)  # of the dropout
        found.append(_learned(module, parameters, x))
    assert all(map(torch.equal, *found))


def test_in_half_the_result_is_that_of_float32_to_rounding() -> None:
    for alpha in (4.0, 3.0):
        (half, parameters), x = _made(BF16, network_alpha=alpha), torch.randn(2, 3, 8).to(BF16)
        whole, whole_parameters = _made(network_alpha=alpha)
        for name, weight in whole.named_parameters():  # the base's weights as they are in half
            if not weight.requires_grad:
                weight.data = dict(half.named_parameters())[name].float()
        for got, expected in zip(
            _learned(half, parameters, x), _learned(whole, whole_parameters, x.float()), strict=True
        ):
            # A few roundings to 8 bits one after the other; PEFT's own result under autocast is as far away.
            assert float((got.float() - expected).norm() / expected.norm()) < 0.02
        assert all(parameter.dtype == torch.float32 for parameter in parameters)


def test_in_half_a_pass_casts_all_weights_at_once_and_all_gradients() -> None:
    (module, _), x = _made(BF16), torch.randn(2, 3, 8).to(BF16)
    with Dispatched() as forward:
        output = module(x)
    with Dispatched() as backward:
        output.sum().backward()
    assert (forward.cast_kernels, backward.cast_kernels) == (1, 1)
    with Dispatched() as drawing, torch.no_grad():
        module(x)
    assert drawing.cast_kernels == 1
    _as_peft(module)
    with Dispatched() as pefts, torch.autocast("cpu", BF16, cache_enabled=False):
        module(x)
    assert pefts.cast_kernels > 10


def test_no_layer_ever_computes_with_weights_of_an_earlier_step() -> None:
    (module, parameters), x = _made(BF16), torch.randn(2, 3, 8).to(BF16)
    module(x).sum().backward()
    copied = copy.deepcopy(module)
    first = module.first(x).detach()
    with torch.no_grad():
        before = module(x)
        assert torch.equal(module.first(x), first)
        for parameter in parameters:
            parameter.mul_(2.0)
        assert not torch.equal(module.first(x), first)  # as ComfyUI's sampler calls it: not through the module
        after = module(x)
        assert not torch.equal(after, before)
        assert torch.equal(copied(x), before)
    assert torch.equal(module(x), after)
    with adapter.switched_off({"": module}), torch.no_grad():
        assert torch.equal(module.first(x), module.first.base_layer(x))
