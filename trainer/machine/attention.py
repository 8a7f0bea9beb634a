"""How attention is computed, and in which precision fp32 products run while a model is trained.

Neither xformers nor TF32 has been run by the project, whose machines have no GPU: choosing, falling back and
putting back are tested, the rest is ready in scripts/check_gpu.py.
"""

from __future__ import annotations

import importlib.util
from typing import Any

import torch

from ..config import AUTO


def choose_attention(requested: str, device: torch.device) -> tuple[str, str]:
    """``sdpa`` or ``xformers``, and a sentence when it is not what was asked for (empty otherwise).

    ``auto`` is torch's own scaled dot product attention everywhere: it picks flash or memory-efficient kernels for the
    device by itself, the latter being those that xformers brought.
    """
    if requested in (AUTO, "sdpa"):
        return "sdpa", ""
    if device.type != "cuda":
        return "sdpa", "attention xformers needs an NVIDIA GPU; this run uses sdpa"
    if importlib.util.find_spec("xformers") is None:
        return "sdpa", "attention xformers needs the package xformers, which is not installed; this run uses sdpa"
    return "xformers", ""


def use_attention(unet: Any, attention: str) -> tuple[str, str]:
    """Bring a diffusers UNet into line with :func:`choose_attention`; what is used, and a sentence if it is not that.

    xformers is built for one version of torch and one of CUDA, and says so only when it is called.
    """
    if attention != "xformers":
        return attention, ""
    try:
        unet.enable_xformers_memory_efficient_attention()
    except Exception as error:  # whatever a package that was built for another torch does
        from diffusers.models.attention_processor import AttnProcessor2_0

        unet.set_attn_processor(AttnProcessor2_0())  # diffusers' "default" one is the plain one, without sdpa
        return "sdpa", f"xformers cannot be used ({type(error).__name__}: {str(error)[:120]}); this run uses sdpa"
    return attention, ""
