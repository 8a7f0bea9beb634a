"""The narrow UNet: Stable Diffusion 1.5's layers, names and order, with two levels of 64 and 128 channels.

Expanded (every channel 5 times, `demo.expand`), it has 320 and 640 channels, and ComfyUI and diffusers load it as
SD 1.5. Latents [n, 4, 8, 8], time steps 0..999, context [n, 77, 96]; predicts the noise (eps).
"""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F
from torch import nn

CHANNELS = 64
CONTEXT = 96
HEADS = 8
GROUPS = 32
REPEAT = 5
"""How often each channel is repeated: 64 x 5 = 320, SD 1.5's width."""


def time_features(steps: torch.Tensor) -> torch.Tensor:
    """Sinusoidal features float32 [n, 64]: every REPEAT-th of the 160 frequencies of SD 1.5 (cosines, then sines)."""
    half = CHANNELS // 2
    frequencies = torch.exp(-math.log(10000) * torch.arange(half, device=steps.device) / half)
    angles = steps.float()[:, None] * frequencies
    return torch.cat([angles.cos(), angles.sin()], 1)


class ResBlock(nn.Module):
    """Residual block: two times norm, SiLU and convolution, with the time embedding added in between."""

    def __init__(self, inputs: int, outputs: int) -> None:
        super().__init__()
        self.in_layers = nn.Sequential(nn.GroupNorm(GROUPS, inputs), nn.SiLU(), nn.Conv2d(inputs, outputs, 3, 1, 1))
        self.emb_layers = nn.Sequential(nn.SiLU(), nn.Linear(4 * CHANNELS, outputs))
        self.out_layers = nn.Sequential(
            nn.GroupNorm(GROUPS, outputs), nn.SiLU(), nn.Dropout(0.0), nn.Conv2d(outputs, outputs, 3, 1, 1)
        )
        self.skip_connection = nn.Conv2d(inputs, outputs, 1) if inputs != outputs else nn.Identity()
        last = self.out_layers[3]
        assert isinstance(last, nn.Conv2d)
        nn.init.zeros_(last.weight)

    def forward(self, x: torch.Tensor, emb: torch.Tensor) -> torch.Tensor:
        h = self.in_layers(x) + self.emb_layers(emb)[:, :, None, None]
        out: torch.Tensor = self.skip_connection(x) + self.out_layers(h)
        return out


class Attention(nn.Module):
    """Multi-head attention of [n, l, width] over a context [n or m, k, context width].

    If the context has fewer rows than x, each row is shared by the same number of consecutive images (a training batch
    has several images per caption, whose keys and values are computed once).
    """

    def __init__(self, width: int, context: int) -> None:
        super().__init__()
        self.to_q = nn.Linear(width, width, bias=False)
        self.to_k = nn.Linear(context, width, bias=False)
        self.to_v = nn.Linear(context, width, bias=False)
        self.to_out = nn.Sequential(nn.Linear(width, width), nn.Dropout(0.0))

    def forward(self, x: torch.Tensor, context: torch.Tensor) -> torch.Tensor:
        n, length, width = x.shape
        rows, shared = context.shape[0], n // context.shape[0]
        # Concatenate the images of one caption along the query axis, since attention is independent for each query.
        q = self.to_q(x).view(rows, shared * length, HEADS, -1).transpose(1, 2)
        k = self.to_k(context).view(rows, context.shape[1], HEADS, -1).transpose(1, 2)
        v = self.to_v(context).view(rows, context.shape[1], HEADS, -1).transpose(1, 2)
        h = F.scaled_dot_product_attention(q, k, v).transpose(1, 2).reshape(n, length, width)
        out: torch.Tensor = self.to_out(h)
        return out


class GEGLU(nn.Module):
    """Gated GELU: one linear layer computes value and gate."""

    def __init__(self, width: int, inner: int) -> None:
        super().__init__()
        self.proj = nn.Linear(width, 2 * inner)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        value, gate = self.proj(x).chunk(2, -1)
        return value * F.gelu(gate)


class FeedForward(nn.Module):
    """GEGLU and a linear layer back to the original width."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.net = nn.Sequential(GEGLU(width, 4 * width), nn.Dropout(0.0), nn.Linear(4 * width, width))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        out: torch.Tensor = self.net(x)
        return out


class TransformerBlock(nn.Module):
    """Self-attention, cross-attention to the caption, feed-forward."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.attn1 = Attention(width, width)
        self.ff = FeedForward(width)
        self.attn2 = Attention(width, CONTEXT)
        self.norm1 = nn.LayerNorm(width)
        self.norm2 = nn.LayerNorm(width)
        self.norm3 = nn.LayerNorm(width)

    def forward(self, x: torch.Tensor, context: torch.Tensor) -> torch.Tensor:
        h = self.norm1(x)
        x = x + self.attn1(h, h)
        x = x + self.attn2(self.norm2(x), context)
        out: torch.Tensor = x + self.ff(self.norm3(x))
        return out


class SpatialTransformer(nn.Module):
    """A transformer block over the pixels of [n, c, h, w]."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.norm = nn.GroupNorm(GROUPS, width, eps=1e-6)
        self.proj_in = nn.Conv2d(width, width, 1)
        self.transformer_blocks = nn.ModuleList([TransformerBlock(width)])
        self.proj_out = nn.Conv2d(width, width, 1)
        nn.init.zeros_(self.proj_out.weight)

    def forward(self, x: torch.Tensor, context: torch.Tensor) -> torch.Tensor:
        h = self.proj_in(self.norm(x))
        n, c, height, width = h.shape
        h = h.permute(0, 2, 3, 1).reshape(n, height * width, c)
        h = self.transformer_blocks[0](h, context)
        h = h.view(n, height, width, c).permute(0, 3, 1, 2)
        out: torch.Tensor = x + self.proj_out(h)
        return out


class Downsample(nn.Module):
    def __init__(self, width: int) -> None:
        super().__init__()
        self.op = nn.Conv2d(width, width, 3, 2, 1)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        out: torch.Tensor = self.op(x)
        return out


class Upsample(nn.Module):
    def __init__(self, width: int) -> None:
        super().__init__()
        self.conv = nn.Conv2d(width, width, 3, 1, 1)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        out: torch.Tensor = self.conv(F.interpolate(x, scale_factor=2.0, mode="nearest"))
        return out


class UNet(nn.Module):
    """Two levels (64 and 128 channels) with one block each on the way down, two on the way up, attention everywhere."""

    def __init__(self) -> None:
        super().__init__()
        a, b = CHANNELS, 2 * CHANNELS
        self.time_embed = nn.Sequential(nn.Linear(a, 4 * a), nn.SiLU(), nn.Linear(4 * a, 4 * a))

        def block(inputs: int, outputs: int, *more: nn.Module) -> nn.ModuleList:
            return nn.ModuleList([ResBlock(inputs, outputs), SpatialTransformer(outputs), *more])

        self.input_blocks = nn.ModuleList(
            [
                nn.ModuleList([nn.Conv2d(4, a, 3, 1, 1)]),
                block(a, a),
                nn.ModuleList([Downsample(a)]),
                block(a, b),
            ]
        )
        self.middle_block = nn.ModuleList([ResBlock(b, b), SpatialTransformer(b), ResBlock(b, b)])
        self.output_blocks = nn.ModuleList(
            [block(b + b, b), block(b + a, b, Upsample(b)), block(b + a, a), block(a + a, a)]
        )
        self.out = nn.Sequential(nn.GroupNorm(GROUPS, a), nn.SiLU(), nn.Conv2d(a, 4, 3, 1, 1))

    @staticmethod
    def _run(parts: nn.ModuleList, x: torch.Tensor, emb: torch.Tensor, context: torch.Tensor) -> torch.Tensor:
        for part in parts:
            if isinstance(part, ResBlock):
                x = part(x, emb)
            elif isinstance(part, SpatialTransformer):
                x = part(x, context)
            else:
                x = part(x)
        return x

    def forward(self, x: torch.Tensor, steps: torch.Tensor, context: torch.Tensor) -> torch.Tensor:
        emb = self.time_embed(time_features(steps))
        skips = []
        for parts in self.input_blocks:
            assert isinstance(parts, nn.ModuleList)
            x = self._run(parts, x, emb, context)
            skips.append(x)
        x = self._run(self.middle_block, x, emb, context)
        for parts in self.output_blocks:
            assert isinstance(parts, nn.ModuleList)
            x = self._run(parts, torch.cat([x, skips.pop()], 1), emb, context)
        out: torch.Tensor = self.out(x)
        return out
