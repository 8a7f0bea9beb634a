"""The CLIP text encoders of a Stable Diffusion base, for training."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

from ..conditioning import Conditioning
from .families import Family
from .target_layers import text_target_layers
from .text_encoder import LENGTH, TokenChunks, encode, lora_layer_name, used_layers


@dataclass(frozen=True)
class ClipText:
    """See :class:`trainer.base.trainable_text.TrainableText`.

    Attributes:
        family: family of the text encoders.
        clip_layer: the layer to take, in ComfyUI's counting (-1 is the last); None for the family's default.
        chunks: splits a prompt into chunks for each text encoder, as for sampling.
        models: builds the text encoders, in the family's order.
    """

    family: Family
    clip_layer: int | None
    chunks: Callable[[str], tuple[TokenChunks, ...]]
    models: Callable[[torch.dtype], list[Any]]

    @property
    def clip_skip(self) -> int:
        """In kohya's counting."""
        return -self.clip_layer if self.clip_layer is not None else 1

    @property
    def narrowest(self) -> int:
        """Width of the narrowest text encoder."""
        return min(shape.width for shape in self.family.text_encoders)

    def build(self, dtype: torch.dtype) -> dict[str, nn.Module]:
        """The text encoders by kohya's key prefix."""
        shapes = self.family.text_encoders
        return {shape.prefix: model for shape, model in zip(shapes, self.models(dtype), strict=True)}

    def tokenize(self, prompt: str) -> tuple[TokenChunks, ...]:
        """The prompt's chunks for each text encoder."""
        return self.chunks(prompt)

    def encode(self, models: Sequence[Any], tokens: Sequence[tuple[TokenChunks, ...]]) -> list[Conditioning]:
        """See :func:`trainer.base.sd.text_encoder.encode`."""
        return encode(models, self.family.text_encoders, tokens, self.clip_layer)

    def adapter_layers(self, prefix: str, model: nn.Module, lora_targets: str) -> dict[str, nn.Module]:
        """The layers up to the one that prompts are taken from."""
        shapes = {shape.prefix: shape for shape in self.family.text_encoders}
        return text_target_layers(model, lora_targets, used_layers(shapes[prefix], self.clip_layer))

    def file_key(self, prefix: str, layer: str) -> str:
        """kohya's key."""
        return f"{prefix}_{lora_layer_name(layer)}".replace(".", "_")

    def activation_bytes(self, tokens: int, dtype: torch.dtype) -> int:
        """``s h (34 + 5 a s / h)`` bytes per layer in half precision (arXiv 2205.05198, section 4.1), with ``tokens``
        tokens in chunks of 77."""
        return sum(
            round(
                shape.layers * tokens * shape.width * (34 + 5 * shape.heads * LENGTH / shape.width) * dtype.itemsize / 2
            )
            for shape in self.family.text_encoders
        )
