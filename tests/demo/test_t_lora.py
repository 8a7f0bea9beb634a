"""A T-LoRA predicts each picture of a batch with the ranks of its time, and the same network draws with all of them."""

from __future__ import annotations

import copy
from collections.abc import Sequence

import torch
from torch import nn

from subjectbooth.demo.making.t_lora import MaskedNetwork, masked, mean_over_masks, ranks_in_use
from subjectbooth.trainer.config import TrainConfig
from subjectbooth.trainer.learn.adapter import inject, layers_of, lora_layers
from subjectbooth.trainer.preserve.adapter_layer import AdapterLayer

RANK = 8
TIMES = torch.tensor([0, 1, 250, 251, 999])
RANKS = [8, 7, 7, 6, 4]


class Net(nn.Module):
    """Convolutions [n, c, h, w], linear layers over tokens [n, m, c] and over pictures [n, c]."""

    def __init__(self) -> None:
        super().__init__()
        self.conv, self.tokens, self.time = nn.Conv2d(8, 8, 3, padding=1), nn.Linear(8, 8), nn.Linear(8, 8)

    def forward(self, x: torch.Tensor, times: torch.Tensor, context: torch.Tensor) -> torch.Tensor:
        features = self.time(times[:, None] / 1000 + torch.arange(8))
        there = self.conv(x) * self.tokens(context).sum((1, 2))[:, None, None, None]
        out: torch.Tensor = there + features[:, :, None, None]
        return out


def of_rank(net: nn.Module, rank: int) -> nn.Module:
    """A copy whose LoRA has zeros in place of the ranks above *rank*."""
    net = copy.deepcopy(net)
    for layer in lora_layers(net):
        layer.own_weights()[1].data[:, rank:] = 0
    return net


def test_ranks_fall_with_the_noise_from_all_to_half() -> None:
    assert ranks_in_use(TIMES, RANK, smallest=4).tolist() == RANKS
    assert ranks_in_use(torch.tensor([0, 499, 501, 999]), 16, smallest=1).tolist() == [16, 8, 8, 1]


def test_a_masked_batch_is_predicted_with_the_ranks_of_its_times() -> None:
    net = Net().requires_grad_(False)
    inject(net, TrainConfig(rank=RANK, network_alpha=4.0), dict(net.named_children()))
    generator = torch.Generator().manual_seed(0)
    for layer in lora_layers(net):
        up = layer.own_weights()[1]
        up.data = torch.randn(up.shape, generator=generator)
    x = torch.randn(len(TIMES), 8, 4, 4, generator=generator)
    context = torch.randn(len(TIMES), 3, 8, generator=generator)
    with torch.no_grad():
        full = net(x, TIMES, context)
        drawn = MaskedNetwork(net)(x, TIMES, context)
        one_by_one = [of_rank(net, rank)(x[[i]], TIMES[[i]], context[[i]]) for i, rank in enumerate(RANKS)]
        assert torch.equal(net(x, TIMES, context), full), "outside, all ranks are in use"
    torch.testing.assert_close(drawn, torch.cat(one_by_one), atol=1e-5, rtol=1e-4)
    assert (drawn - full).abs().amax((1, 2, 3))[1:].min() > 1e-2
    with masked(net, TIMES[-1:]):
        net(x[-1:], TIMES[-1:], context[-1:]).square().sum().backward()
    for layer in lora_layers(net):
        down, up = (weight.grad for weight in layer.own_weights())
        assert down[4:].eq(0).all() and down[:4].ne(0).any()
        assert up[:, 4:].eq(0).all() and up[:, :4].ne(0).any()


def test_a_penalty_is_the_mean_over_times_of_that_of_the_ranks_in_use() -> None:
    net = Net().requires_grad_(False)
    inject(net, TrainConfig(rank=RANK, network_alpha=4.0), dict(net.named_children()))
    for layer in lora_layers(net):
        layer.own_weights()[0].data.fill_(1.0)
        layer.own_weights()[1].data.fill_(1.0)
    layers = list(layers_of(net))

    def change(some: Sequence[AdapterLayer]) -> torch.Tensor:
        return sum(((layer.up.flatten(1) @ layer.down.flatten(1))[0, 0] for layer in some), torch.zeros(()))

    expected = ranks_in_use(torch.arange(1000), RANK).float().mean() * len(layers)  # 4, 5, 6 and 7 ranks
    torch.testing.assert_close(mean_over_masks(change, layers), expected, atol=0.05, rtol=0.0)
    assert expected < 6 * len(layers) < change(layers)
