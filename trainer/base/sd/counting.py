"""Prepares diffusers' UNet for counting its memory on the meta device; see :mod:`trainer.memory.footprint`."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import nn

_BLOCKS = ("ResnetBlock2D", "BasicTransformerBlock")
"""The modules that diffusers recomputes one by one under gradient checkpointing."""


def checkpointed_blocks(unet: nn.Module) -> list[nn.Module]:
    """The blocks that gradient checkpointing recomputes one by one."""
    return [module for module in unet.modules() if type(module).__name__ in _BLOCKS]


@contextmanager
def countable(unet: nn.Module) -> Iterator[nn.Module]:
    """Inside, the UNet allocates as much as on a real device with memory-efficient attention and without gradient
    checkpointing."""
    checkpointed = [module for module in unet.modules() if getattr(module, "gradient_checkpointing", False)]
    processors = dict(unet.attn_processors)  # type: ignore[arg-type]
    try:
        for module in checkpointed:
            module.gradient_checkpointing = False  # type: ignore[assignment]
        unet.set_attn_processor(_Processor())  # type: ignore[operator]
        yield unet
    finally:
        unet.set_attn_processor(processors)  # type: ignore[operator]
        for module in checkpointed:
            module.gradient_checkpointing = True  # type: ignore[assignment]


class MemoryEfficientAttention(torch.autograd.Function):
    """Keeps what any memory-efficient attention keeps: inputs, output and one float32 per query."""

    @staticmethod
    def forward(context: Any, query: torch.Tensor, key: torch.Tensor, value: torch.Tensor) -> torch.Tensor:
        output = torch.empty_like(query)
        context.save_for_backward(query, key, value, output, query.new_empty(query.shape[:-1], dtype=torch.float32))
        return output

    @staticmethod
    def backward(context: Any, *gradients: torch.Tensor) -> tuple[torch.Tensor, ...]:
        query, key, value, *_ = context.saved_tensors
        return torch.empty_like(query), torch.empty_like(key), torch.empty_like(value)


class _Processor:
    """diffusers' attention without the kernel: on the meta device torch's would keep whole score matrices."""

    def __call__(
        self,
        attn: Any,
        hidden_states: torch.Tensor,
        encoder_hidden_states: torch.Tensor | None = None,
        *arguments: Any,
        **keywords: Any,
    ) -> torch.Tensor:
        context = hidden_states if encoder_hidden_states is None else encoder_hidden_states
        heads = (
            projected.unflatten(-1, (attn.heads, -1)).transpose(1, 2)
            for projected in (attn.to_q(hidden_states), attn.to_k(context), attn.to_v(context))
        )
        output = MemoryEfficientAttention.apply(*heads).transpose(1, 2).flatten(2)
        return attn.to_out[1](attn.to_out[0](output))
