"""The narrow text encoder: CLIP's layout, 96 wide, with only the vocabulary that the demo's captions use.

Expanded (every channel 8 times, zero layers up to 12, zero rows for the rest of the vocabulary), it is a CLIP ViT-L/14
text model. Parameter names are CLIP's.
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
    """One CLIP layer: causal self-attention and a quick-GELU MLP, each after a LayerNorm."""

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

    @torch.no_grad()
    def start_as_bag_of_words(self, filler: Sequence[int], marks: Sequence[int]) -> None:
        """Initialise so that every position, including the 70 of padding, carries the meaningful words.

        ComfyUI pads a caption to 77 tokens without a mask. With a random initialisation, the single token of the class
        is 1/77 of what cross-attention sees, and the class was still ignored after 1,000 steps. So one channel marks
        meaningless tokens (*filler* words; *marks*: start and end), and the first layer's keys initially point away
        from it.

        Args:
            filler: token ids of words that every caption has ('a', 'photo', 'of', ...).
            marks: token ids of start and end.
        """
        assert isinstance(self.vocabulary, torch.Tensor)
        embedding = self.token_embedding.weight
        nn.init.normal_(embedding, std=1.0)
        nn.init.normal_(self.position_embedding.weight, std=0.05)
        embedding[:, 0] = 0
        self.position_embedding.weight[:, 0] = 0
        rows = torch.searchsorted(self.vocabulary, torch.tensor(list(marks)))
        embedding[rows] *= 0.1
        embedding[rows, 0] = 3
        embedding[torch.searchsorted(self.vocabulary, torch.tensor(list(filler))), 0] = 6
        first = self.layers[0]
        assert isinstance(first, Layer)
        attention = {name: part for name, part in first.self_attn.items() if isinstance(part, nn.Linear)}
        heads = torch.arange(0, WIDTH, WIDTH // HEADS)
        attention["q_proj"].bias[heads] = 2
        attention["k_proj"].weight[heads] = 0
        attention["k_proj"].weight[heads, 0] = -1
        for name in ("v_proj", "out_proj"):
            nn.init.orthogonal_(attention[name].weight)

    @torch.no_grad()
    def restart_words(self, words: Sequence[int], like: Sequence[int], strength: float = 1.0) -> None:
        """Give *words* random embeddings distributed like those of *like*, so that the output differs between them.

        If trained with the rest, meaningless words are suppressed: the output for 'ohwx dog' differed by 0.6 % from
        'dog' ('cat': 13 %), and a LoRA on the UNet alone could not distinguish the subject from its class. CLIP passes
        rare tokens on; it is the UNet that ignores them.
        """
        assert isinstance(self.vocabulary, torch.Tensor)
        embedding = self.token_embedding.weight
        spread = embedding[torch.searchsorted(self.vocabulary, torch.tensor(list(like)))]
        mean = spread.mean(0)
        mix = torch.randn(len(words), len(spread)) / len(spread) ** 0.5
        embedding[torch.searchsorted(self.vocabulary, torch.tensor(list(words)))] = mean + strength * mix @ (
            spread - mean
        )

    def forward(self, ids: torch.Tensor) -> torch.Tensor:
        assert isinstance(self.vocabulary, torch.Tensor)
        x = self.token_embedding(torch.searchsorted(self.vocabulary, ids))
        x = x + self.position_embedding.weight
        for layer in self.layers:
            x = layer(x)
        out: torch.Tensor = self.final_layer_norm(x)
        return out
