"""Kernels of ComfyUI that have no backward pass, and what stands in for them while a model is trained."""

from __future__ import annotations

import contextlib
import functools
import importlib
import sys
from collections.abc import Callable, Iterator
from typing import Any

import comfy.ldm.modules.attention
import comfy.model_management
import torch
from comfy.ldm.modules.attention import attention_pytorch

_FUSED = "comfy_kitchen"
"""Namespace of ComfyUI's fused operations (norms, rotary embeddings), and the package that has them."""

_ATTENTION = ("optimized_attention", "optimized_attention_masked")


@functools.cache
def reference_of(operation: Any) -> Callable[..., Any] | None:
    """The plain PyTorch that a fused operation of ComfyUI stands for; None of any other function."""
    if not isinstance(operation, (torch._ops.OpOverload, torch._ops.OpOverloadPacket)):
        return None
    namespace, name, *_ = str(operation).split(".")
    if namespace != _FUSED:
        return None
    return getattr(importlib.import_module(f"{_FUSED}.backends.eager"), name, None)


@contextlib.contextmanager
def with_backward() -> Iterator[None]:
    """Inside, ComfyUI uses PyTorch's attention and none of its kernels without a backward pass.

    Some models hand their options on to the attention, where it could be replaced, and some call it without.
    """
    with contextlib.ExitStack() as stack:
        if hasattr(comfy.model_management, "in_training"):  # 0.3.75 has no such kernels
            stack.enter_context(_changed(vars(comfy.model_management), "in_training", True))
        for name in _ATTENTION:
            chosen = getattr(comfy.ldm.modules.attention, name)
            for module in list(sys.modules.values()):
                names = getattr(module, "__dict__", {})
                if names.get(name) is chosen:
                    stack.enter_context(_changed(names, name, attention_pytorch))
        yield


@contextlib.contextmanager
def _changed(names: dict[str, Any], name: str, value: Any) -> Iterator[None]:
    before = names[name]
    names[name] = value
    try:
        yield
    finally:
        names[name] = before
