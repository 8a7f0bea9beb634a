"""The autoencoder: the layout of TAESD (Ollin Boer Bohan's Tiny AutoEncoder for Stable Diffusion) with other widths.

TAESD has 64 channels everywhere and no norm layers, so padding with zeros turns a net with fewer channels (which may
differ by resolution) into an equivalent 64-channel one; `demo.expand` does that. Module indices are TAESD's.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import nn

LATENT_CHANNELS = 4


class Block(nn.Module):
    """Three 3x3 convolutions and a skip, then ReLU. [n, c, h, w] -> the same."""

    def __init__(self, width: int) -> None:
        super().__init__()
        layers: list[nn.Module] = []
        for _ in range(3):
            layers += [nn.Conv2d(width, width, 3, padding=1), nn.ReLU()]
        self.conv = nn.Sequential(*layers[:-1])
        self.fuse = nn.ReLU()

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.fuse(self.conv(x) + x)


class Clamp(nn.Module):
    """Soft clamp of latents to -3..3."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return torch.tanh(x / 3) * 3


def _init(module: nn.Module) -> None:
    """He initialisation; each block's last convolution is scaled by 0.1, or the deep ReLU stack would hardly train."""
    for part in module.modules():
        if isinstance(part, nn.Conv2d):
            nn.init.kaiming_normal_(part.weight, nonlinearity="relu")
            if part.bias is not None:
                nn.init.zeros_(part.bias)
    for part in module.modules():
        if isinstance(part, Block):
            last = part.conv[4]
            assert isinstance(last, nn.Conv2d)
            with torch.no_grad():
                last.weight.mul_(0.1)


def make_encoder(widths: Sequence[int]) -> nn.Sequential:
    """*widths*: channels at 64, 32, 16 and 8 px.

    Images [n, 3, h, w] in 0..1 -> latents [n, 4, h/8, w/8] in model space (VAE output x 0.18215), std about 1.
    """
    layers: list[nn.Module] = [nn.Conv2d(3, widths[0], 3, padding=1), Block(widths[0])]
    for before, width in zip(widths, widths[1:], strict=False):
        layers += [nn.Conv2d(before, width, 3, stride=2, padding=1, bias=False)]
        layers += [Block(width) for _ in range(3)]
    net = nn.Sequential(*layers, nn.Conv2d(widths[-1], LATENT_CHANNELS, 3, padding=1))
    _init(net)
    return net


def make_decoder(widths: Sequence[int]) -> nn.Sequential:
    """*widths*: channels at 64, 32, 16 and 8 px.

    Latents [n, 4, h/8, w/8] in model space -> images [n, 3, h, w], about 0..1.
    """
    layers: list[nn.Module] = [Clamp(), nn.Conv2d(LATENT_CHANNELS, widths[-1], 3, padding=1), nn.ReLU()]
    down = list(reversed(widths))
    for width, after in zip(down, down[1:], strict=False):
        layers += [Block(width) for _ in range(3)]
        layers += [nn.Upsample(scale_factor=2), nn.Conv2d(width, after, 3, padding=1, bias=False)]
    layers += [Block(down[-1]), nn.Conv2d(down[-1], 3, 3, padding=1)]
    net = nn.Sequential(*layers)
    _init(net)
    last = net[-1]
    assert isinstance(last, nn.Conv2d) and last.bias is not None
    with torch.no_grad():
        last.weight.mul_(0.1)
        last.bias.fill_(0.5)
    return net


def encoder_widths(state: dict[str, torch.Tensor]) -> list[int]:
    """An encoder's widths, from its weights: those of the first convolution at each resolution."""
    return [len(state[f"{i}.weight"]) for i in (0, 2, 6, 10)]


def decoder_widths(state: dict[str, torch.Tensor]) -> list[int]:
    """A decoder's widths, from its weights."""
    return [len(state[f"{i}.weight"]) for i in (17, 12, 7, 1)]


@torch.no_grad()
def grow(net: nn.Module, trained: dict[str, torch.Tensor]) -> None:
    """Initialise a wider net from a trained narrower one of the same layout, so that it computes the same function.

    The first channels are the trained ones, with zero weights from the new ones, which keep their random values.
    """
    for name, value in net.state_dict().items():
        old = trained[name]
        if value.dim() > 1:
            value[: old.shape[0]] = 0
            value[: old.shape[0], : old.shape[1]] = old
        else:
            value[: len(old)] = old
