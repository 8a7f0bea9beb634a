"""Text encoders that can get a LoRA of their own."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Protocol

import torch
from torch import nn

from .conditioning import Conditioning


class TrainableText(Protocol):
    """The text encoders of a base that can be trained with the network; a base without one keeps its own frozen.

    Attributes:
        clip_skip: which layer prompts come from, by kohya's count: 1 is the last.
        narrowest: width of the narrowest layer that can get a LoRA.
    """

    @property
    def clip_skip(self) -> int: ...

    @property
    def narrowest(self) -> int: ...

    def build(self, dtype: torch.dtype) -> dict[str, nn.Module]:
        """The text encoders by the prefix of their keys in LoRA files (``lora_te``), frozen, on the CPU."""
        ...

    def tokenize(self, prompt: str) -> Any:
        """A prompt as :meth:`encode` takes it.

        Raises:
            SubjectBoothError: a prompt that a text encoder in training cannot take in.
        """
        ...

    def encode(self, models: Sequence[Any], tokens: Sequence[Any]) -> list[Conditioning]:
        """One conditioning a prompt, float32, on the models' device; differentiable where they have trainable weights.

        Args:
            models: from :meth:`build`, in its order, perhaps wrapped by accelerate.
            tokens: from :meth:`tokenize`.
        """
        ...

    def adapter_layers(self, prefix: str, model: nn.Module, lora_targets: str) -> dict[str, nn.Module]:
        """The layers that get a LoRA, by module name: only those that a prompt comes from."""
        ...

    def file_key(self, prefix: str, layer: str) -> str:
        """What a LoRA file calls a layer."""
        ...

    def activation_bytes(self, tokens: int, dtype: torch.dtype) -> int:
        """Bytes kept for the backward pass of prompts of so many tokens."""
        ...
