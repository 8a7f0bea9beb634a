"""Choice of the attention implementation.

The project's test machines have no GPU, so xformers itself is untested: choosing it and falling back are tested, and
scripts/check_gpu.py covers the rest.
"""

from __future__ import annotations

import importlib.util
from typing import Any

import torch

from ..config import AUTO


def choose_attention(requested: str, device: torch.device) -> tuple[str, str]:
    """``sdpa`` or ``xformers``, and a note if that differs from the request (otherwise empty).

    ``auto`` always means torch's scaled_dot_product_attention, which picks flash or memory-efficient kernels (the
    latter come from xformers) for the device by itself.
    """
    if requested in (AUTO, "sdpa"):
        return "sdpa", ""
    if device.type != "cuda":
        return "sdpa", "attention xformers needs an NVIDIA GPU; this run uses sdpa"
    if importlib.util.find_spec("xformers") is None:
        return "sdpa", "attention xformers needs the package xformers, which is not installed; this run uses sdpa"
    return "xformers", ""


def use_attention(unet: Any, attention: str) -> tuple[str, str]:
    """Apply the result of :func:`choose_attention` to a diffusers UNet.

    xformers is built for one version of torch and of CUDA, and only reports a mismatch when it is called.

    Returns:
        The implementation in use, and a note if it differs from ``attention``.
    """
    if attention != "xformers":
        return attention, ""
    try:
        unet.enable_xformers_memory_efficient_attention()
    except Exception as error:  # a build for another torch can fail in any way
        from diffusers.models.attention_processor import AttnProcessor2_0

        unet.set_attn_processor(AttnProcessor2_0())  # diffusers' default processor does not use sdpa
        return "sdpa", f"xformers cannot be used ({type(error).__name__}: {str(error)[:120]}); this run uses sdpa"
    return attention, ""
