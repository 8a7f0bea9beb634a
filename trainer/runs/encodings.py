"""What the text encoder and the VAE give, kept for further runs of the same base."""

from __future__ import annotations

import weakref
from collections import OrderedDict
from collections.abc import Sequence
from typing import Any

import torch

from ..base.base_model import BaseModel
from ..base.conditioning import Conditioning
from ..base.finite import is_finite
from ..config import TrainConfig
from ..files.storage import sha256_of
from ..subject.subject import PreparedSubject, Subject

DEFAULT_LIMIT = 2**30
"""Bytes. Five photos of 1024 pixels with their latents take 65 MB, a prompt of SDXL 0.6 MB."""


class EncodingCache:
    """Prepared photos, their latents and encoded prompts, on the CPU, the least recently used dropped first.

    An encoding is found again by the base's digest, the device and the content that was encoded, so a run gets the bits
    that it would have made itself: both encoders take each batch (each prompt) for itself, whatever else is encoded.
    For one thread at a time.

    Args:
        limit: bytes; 0 keeps nothing.
    """

    def __init__(self, limit: int = DEFAULT_LIMIT) -> None:
        self._limit = limit
        self._entries: OrderedDict[tuple[Any, ...], tuple[Any, int]] = OrderedDict()

    @property
    def size(self) -> int:
        """Bytes that it holds."""
        return sum(size for _, size in self._entries.values())

    def photos(self, subject: Subject, config: TrainConfig) -> tuple[PreparedSubject, ...]:
        """The photos as they are trained on: one group, or one for each aspect-ratio bucket.

        Found again for the same subject object only: comparing large photos would take as long as preparing them.
        """
        side, masks, buckets = config.resolution, config.masked_loss, config.enable_bucket
        key = ("photos", id(subject), side, masks, buckets)
        found = self._find(key)
        if found is not None and found[0]() is subject:
            return found[1]  # type: ignore[no-any-return]
        groups = (
            subject.prepare_buckets(side, with_masks=masks) if buckets else (subject.prepare(side, with_masks=masks),)
        )
        tensors = [tensor for group in groups for tensor in (group.images, group.masks) if tensor is not None]
        self._keep(key, (weakref.ref(subject), groups), tensors)
        return groups

    def prompts(self, base: BaseModel, prompts: Sequence[str], device: str) -> dict[str, Conditioning]:
        """Encoded prompts by prompt; those that are missing are encoded in one call."""
        keys = {prompt: ("prompt", base.digest, device, prompt) for prompt in prompts}
        found = {prompt: self._find(key) for prompt, key in keys.items()}
        missing = [prompt for prompt, encoded in found.items() if encoded is None]
        if missing:
            made = dict(zip(missing, base.prompts.encode(missing), strict=True))
            for prompt, encoded in made.items():
                tensors = [encoded.hidden_states, *([] if encoded.pooled is None else [encoded.pooled])]
                self._keep(keys[prompt], encoded, tensors)
            found |= made
        return found

    def latents(self, base: BaseModel, images: torch.Tensor, device: str) -> torch.Tensor:
        """Encoded pictures, float32 [n, 3, h, w] in 0..1."""
        key = ("latents", base.digest, device, sha256_of(images)) if self._limit else ()
        found = self._find(key)
        if found is None:
            found = base.codec.encode(images)
            self._keep(key, found, [found])
        return found  # type: ignore[no-any-return]

    def _find(self, key: tuple[Any, ...]) -> Any:
        if key not in self._entries:
            return None
        self._entries.move_to_end(key)
        return self._entries[key][0]

    def _keep(self, key: tuple[Any, ...], value: Any, tensors: Sequence[torch.Tensor]) -> None:
        size = sum(tensor.numel() * tensor.element_size() for tensor in tensors)
        if size > self._limit or not all(is_finite(tensor) for tensor in tensors):
            return  # what is not finite is reported, and may come out right the next time
        self._entries[key] = (value, size)
        while self.size > self._limit:
            self._entries.popitem(last=False)
