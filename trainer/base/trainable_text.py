"""Text encoders that can be trained."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Protocol

import torch
from torch import nn

from .conditioning import Conditioning


class TrainableText(Protocol):
    """The text encoders of a base, for training with the network. A base without it keeps them frozen.

    Attributes:
        clip_skip: the layer that prompts are taken from, in kohya's counting: 1 is the last.
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
        """A prompt in the form that :meth:`encode` takes.

        Raises:
            SubjectBoothError: the prompt cannot be used for training a text encoder.
        """
        ...

    def encode(self, models: Sequence[Any], tokens: Sequence[Any]) -> list[Conditioning]:
        """One conditioning per prompt, float32, on the models' device; differentiable in trainable weights.

        Args:
            models: from :meth:`build`, in its order, possibly wrapped by accelerate.
            tokens: from :meth:`tokenize`.
        """
        ...

    def adapter_layers(self, prefix: str, model: nn.Module, lora_targets: str) -> dict[str, nn.Module]:
        """The layers that get a LoRA, by module name: only those that affect the encoded prompt."""
        ...

    def file_key(self, prefix: str, layer: str) -> str:
        """A layer's key in a LoRA file, without the suffix."""
        ...

    def activation_bytes(self, tokens: int, dtype: torch.dtype) -> int:
        """Bytes kept for the backward pass of prompts with ``tokens`` tokens in total."""
        ...
