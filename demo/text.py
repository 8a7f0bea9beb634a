"""The narrow text encoder: CLIP's layout, 96 wide, on the few vocabulary rows that the demo's captions use.

Written out wide (every channel 8 times, zero layers up to 12, zero rows for the rest of the vocabulary) it is a
CLIP ViT-L/14 text model. Parameter names are CLIP's.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import nn

WIDTH = 96
HEADS = 12
LAYERS = 2
LENGTH = 77


class Layer(nn.Module):
    """One CLIP layer: causal self-attention and a quick-GELU MLP, each behind a LayerNorm."""

    def __init__(self) -> None:
        super().__init__()
        self.layer_norm1 = nn.LayerNorm(WIDTH)
        self.self_attn = nn.ModuleDict(
            {name: nn.Linear(WIDTH, WIDTH) for name in ("q_proj", "k_proj", "v_proj", "out_proj")}
        )
        self.layer_norm2 = nn.LayerNorm(WIDTH)
        self.mlp = nn.ModuleDict({"fc1": nn.Linear(WIDTH, 4 * WIDTH), "fc2": nn.Linear(4 * WIDTH, WIDTH)})

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        n, length, _ = x.shape
        h = self.layer_norm1(x)
        q, k, v = (
            self.self_attn[name](h).view(n, length, HEADS, -1).transpose(1, 2)
            for name in ("q_proj", "k_proj", "v_proj")
        )
        h = F.scaled_dot_product_attention(q, k, v, is_causal=True)
        x = x + self.self_attn["out_proj"](h.transpose(1, 2).reshape(n, length, -1))
        h = self.mlp["fc1"](self.layer_norm2(x))
        out: torch.Tensor = x + self.mlp["fc2"](h * torch.sigmoid(1.702 * h))
        return out


class TextEncoder(nn.Module):
    """Token ids int64 [n, 77] -> context [n, 77, 96]: the last layer's states after the final LayerNorm."""

    def __init__(self, vocabulary: Sequence[int]) -> None:
        super().__init__()
        self.register_buffer("vocabulary", torch.tensor(sorted(vocabulary)))
        self.token_embedding = nn.Embedding(len(vocabulary), WIDTH)
        self.position_embedding = nn.Embedding(LENGTH, WIDTH)
        self.layers = nn.ModuleList(Layer() for _ in range(LAYERS))
        self.final_layer_norm = nn.LayerNorm(WIDTH)
        for embedding in (self.token_embedding, self.position_embedding):
            nn.init.normal_(embedding.weight, std=0.3 if embedding is self.token_embedding else 0.1)

    def forward(self, ids: torch.Tensor) -> torch.Tensor:
        assert isinstance(self.vocabulary, torch.Tensor)
        x = self.token_embedding(torch.searchsorted(self.vocabulary, ids))
        x = x + self.position_embedding.weight
        for layer in self.layers:
            x = layer(x)
        out: torch.Tensor = self.final_layer_norm(x)
        return out
