"""Checks for NaN and infinity in the base, before training: later they would look like a problem of the photos."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import torch

from ..errors import SubjectBoothError
from ..topics import Topic
from .conditioning import Conditioning


def is_finite(tensor: torch.Tensor) -> bool:
    """Whether all values are finite; ten times as fast as ``torch.isfinite(tensor).all()``."""
    if not tensor.is_floating_point() or not tensor.numel():
        return True
    low, high = torch.aminmax(tensor.detach())  # NaN propagates
    return abs(float(low)) < float("inf") and abs(float(high)) < float("inf")


def check_weight(name: str, kept: torch.Tensor, stored: torch.Tensor, what: str, where: str) -> None:
    """Check a copied weight of the base.

    Args:
        name: its name in the checkpoint.
        kept: the copy, in the dtype in use.
        stored: the original.
        what: the part of the base ("UNet").
        where: source of the weights, for the message.

    Raises:
        SubjectBoothError: it contains NaN or infinity.
    """
    if is_finite(kept):
        return
    if is_finite(stored.float()):
        dtype = str(kept.dtype).removeprefix("torch.")
        raise SubjectBoothError(
            f"the {what}'s weight {name!r} is too large for {dtype}",
            "a precision that can hold it",
            "set precision to bf16 or fp32",
            where,
        )
    raise SubjectBoothError(
        f"the {what}'s weight {name!r} contains NaN or infinity",
        "a base model with finite weights",
        "get the checkpoint again or use another one; merging models or LoRAs in half precision is a usual cause",
        where,
    )


def check_prompts(encoded: Mapping[str, Conditioning]) -> None:
    """Check all encoded prompts.

    Raises:
        SubjectBoothError: NaN or infinity.
    """
    wrong = [prompt for prompt, found in encoded.items() if not all(map(is_finite, found.tensors))]
    if not wrong:
        return
    if len(wrong) == len(encoded):
        raise SubjectBoothError(
            "the text encoder turns every prompt into NaN or infinity",
            "a text encoder with finite weights",
            "get the checkpoint again, or use another text encoder",
            about=Topic.TEXT_ENCODER,
        )
    raise SubjectBoothError(
        f"the text encoder turns the prompt {wrong[0][:60]!r} into NaN or infinity",
        "finite numbers",
        "change that prompt, or use another text encoder",
        about=Topic.TEXT_ENCODER,
    )


def check_latents(latents: torch.Tensor | Sequence[torch.Tensor], names: Sequence[str]) -> None:
    """Check the latents of all photos.

    Args:
        latents: one per photo, n.
        names: names of the photos, n, for the message.

    Raises:
        SubjectBoothError: NaN or infinity.
    """
    wrong = [name for picture, name in zip(latents, names, strict=True) if not is_finite(picture)]
    if not wrong:
        return
    todo = "use another VAE, or one in fp32"  # SDXL's, for one, overflows in fp16
    if len(wrong) == len(names):
        raise SubjectBoothError(
            "the VAE turns every photo into NaN or infinity",
            "a VAE with finite weights, in a precision it can run in",
            todo,
            about=Topic.VAE,
        )
    raise SubjectBoothError(
        f"the VAE turns {' and '.join(wrong)} into NaN or infinity",
        "finite numbers",
        f"{todo}, or leave that photo out",
        about=Topic.VAE,
    )
