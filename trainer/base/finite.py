"""A base whose own weights are not numbers is named before training; later it would look like a fault of the photos."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import torch

from ..errors import SubjectBoothError
from ..topics import Topic
from .conditioning import Conditioning


def is_finite(tensor: torch.Tensor) -> bool:
    """Whether every value is a number. Ten times as fast as ``torch.isfinite(tensor).all()``."""
    if not tensor.is_floating_point() or not tensor.numel():
        return True
    low, high = torch.aminmax(tensor.detach())  # NaN passes through
    return abs(float(low)) < float("inf") and abs(float(high)) < float("inf")


def check_weight(name: str, kept: torch.Tensor, stored: torch.Tensor, what: str, where: str) -> None:
    """Check a weight of the base that was just copied.

    Args:
        name: as the checkpoint has it.
        kept: the copy, in the dtype it is used in.
        stored: the original.
        what: which part of the base it is of ("UNet").
        where: what the weights came from.

    Raises:
        SubjectBoothError: it holds NaN or infinity.
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
        f"the {what}'s weight {name!r} holds values that are not numbers (NaN or infinity)",
        "a base model with whole weights",
        "get the checkpoint again or use another one; merging models or LoRAs in half precision is a usual cause",
        where,
    )


def check_prompts(encoded: Mapping[str, Conditioning]) -> None:
    """Check what the text encoder made of every prompt.

    Raises:
        SubjectBoothError: NaN or infinity.
    """
    wrong = [
        prompt
        for prompt, found in encoded.items()
        if not is_finite(found.hidden_states) or (found.pooled is not None and not is_finite(found.pooled))
    ]
    if not wrong:
        return
    if len(wrong) == len(encoded):
        raise SubjectBoothError(
            "the text encoder turns every prompt into values that are not numbers (NaN or infinity)",
            "a text encoder with whole weights",
            "get the checkpoint again, or use another text encoder",
            about=Topic.TEXT_ENCODER,
        )
    raise SubjectBoothError(
        f"the text encoder turns the prompt {wrong[0][:60]!r} into values that are not numbers (NaN or infinity)",
        "finite numbers",
        "change that prompt, or use another text encoder",
        about=Topic.TEXT_ENCODER,
    )


def check_latents(latents: torch.Tensor | Sequence[torch.Tensor], names: Sequence[str]) -> None:
    """Check what the VAE made of every photo.

    Args:
        latents: n, one a photo.
        names: n, for the message.

    Raises:
        SubjectBoothError: NaN or infinity.
    """
    wrong = [name for picture, name in zip(latents, names, strict=True) if not is_finite(picture)]
    if not wrong:
        return
    todo = "use another VAE, or one in fp32"  # SDXL's, for one, overflows in fp16
    if len(wrong) == len(names):
        raise SubjectBoothError(
            "the VAE turns every photo into values that are not numbers (NaN or infinity)",
            "a VAE with whole weights, in a precision it can run in",
            todo,
            about=Topic.VAE,
        )
    raise SubjectBoothError(
        f"the VAE turns {' and '.join(wrong)} into values that are not numbers (NaN or infinity)",
        "finite numbers",
        f"{todo}, or leave that photo out",
        about=Topic.VAE,
    )
