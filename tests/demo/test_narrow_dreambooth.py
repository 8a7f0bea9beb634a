"""The narrow model's LoRA takes the wide one's steps: both train here, from the same start on the same batches."""

from __future__ import annotations

import copy
from collections.abc import Iterator
from contextlib import contextmanager

import pytest
import torch
from torch import nn

from subjectbooth.demo.base import read_packed
from subjectbooth.demo.expand import TEXT_REPEAT, UNET_REPEAT, wide_unet_weights
from subjectbooth.demo.making import unet as demo_unet
from subjectbooth.demo.making.narrow import load_narrow
from subjectbooth.demo.making.narrow_dreambooth import rate_factor
from subjectbooth.demo.making.words import token_ids
from subjectbooth.trainer.base.sd.target_layers import target_layers
from subjectbooth.trainer.config import TrainConfig
from subjectbooth.trainer.learn.adapter import inject

RATE, STEPS = 2e-3, 3
FIRST = "time_embed.0."
"""The one layer whose inputs are not copies: the wide model has more time features there."""


@contextmanager
def wide_sizes() -> Iterator[None]:
    """Inside, the demo's own UNet, whose sizes are constants, is the wide one."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(demo_unet, "CHANNELS", demo_unet.CHANNELS * UNET_REPEAT)
        patch.setattr(demo_unet, "CONTEXT", demo_unet.CONTEXT * TEXT_REPEAT)
        yield


def wide_unet() -> nn.Module:
    """Call it within :func:`wide_sizes` only."""
    net = demo_unet.UNet()
    net.load_state_dict(wide_unet_weights(read_packed()))
    return net.eval().requires_grad_(False)


def with_adapter(net: nn.Module) -> dict[str, nn.Parameter]:
    inject(net, TrainConfig(rank=8, network_alpha=8.0), target_layers(net, "all"))
    for name, parameter in net.named_parameters():
        if name.startswith(FIRST):
            parameter.requires_grad_(False)
    return with_grad(net)


def with_grad(net: nn.Module) -> dict[str, nn.Parameter]:
    return {name: parameter for name, parameter in net.named_parameters() if parameter.requires_grad}


def own_rates(net: nn.Module) -> list[dict[str, object]]:
    return [
        {"params": [parameter], "lr": RATE * rate_factor(name.replace(".subject.", "."))}
        for name, parameter in with_grad(net).items()
    ]


def train(net: nn.Module, groups: list[dict[str, object]], context: torch.Tensor) -> list[torch.Tensor]:
    """What the net predicts after no step, one, two..."""
    optimizer = torch.optim.AdamW(groups, lr=RATE, weight_decay=0.0)
    generator = torch.Generator().manual_seed(0)
    batches = [torch.randn(2, 4, 8, 8, generator=generator) for _ in range(STEPS)]
    times = torch.tensor([120, 640])
    predictions = []
    for batch in batches:
        with torch.no_grad():
            predictions.append(net(batches[0], times, context))
        loss = (net(batch, times, context) - batch.roll(1, 0)).square().mean()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    return predictions


def test_the_narrow_lora_takes_the_wide_ones_steps() -> None:
    nets = load_narrow()
    context = nets.text(token_ids(["a photo of ohwx dog", "a photo of a dog"])).detach()
    with wide_sizes():
        wide = wide_unet()
        starts = {name: parameter.detach().clone() for name, parameter in with_adapter(wide).items()}
        own = [{"params": list(with_grad(wide).values())}]
        expected = train(wide, own, context.repeat_interleave(TEXT_REPEAT, 2))

    def narrow() -> nn.Module:
        net = copy.deepcopy(nets.unet)
        parameters = with_adapter(net)
        assert parameters.keys() == starts.keys()
        for name, parameter in parameters.items():
            start = starts[name]
            if ".lora_A." in name:
                start = start.unflatten(1, (parameter.shape[1], -1)).sum(2).view_as(parameter)
                assert 0.8 < float(parameter.detach().std() / start.std()) < 1.25, "its own start has the same spread"
                parameter.data.copy_(start)
        return net

    followed = train(net := narrow(), own_rates(net), context)
    missed = train(net := narrow(), [{"params": list(with_grad(net).values())}], context)
    torch.testing.assert_close(followed[0], expected[0], rtol=0, atol=1e-4)
    for step in range(1, STEPS):
        moved = (expected[step] - expected[0]).norm()
        assert float((followed[step] - expected[step]).norm() / moved) < 0.02, f"after {step} steps"
    assert float((missed[-1] - expected[-1]).norm() / moved) > 0.1, "one rate for all would show"
