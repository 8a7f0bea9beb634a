"""A cache for the outputs of text encoder and VAE, shared by runs of the same base."""

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
"""Bytes. Five photos of 1024 px with their latents take 65 MB; a prompt of SDXL takes 0.6 MB."""


class EncodingCache:
    """An LRU cache of prepared photos, latents and encoded prompts, on the CPU.

    Entries are keyed by the base's digest, the device and the encoded content. A cached encoding is bit-identical to a
    new one, because the encoders process each batch of photos and each prompt independently. Not thread-safe.

    Args:
        limit: maximum size in bytes; 0 disables the cache.
    """

    def __init__(self, limit: int = DEFAULT_LIMIT) -> None:
        self._limit = limit
        self._entries: OrderedDict[tuple[Any, ...], tuple[Any, int]] = OrderedDict()

    @property
    def size(self) -> int:
        """Size of all entries in bytes."""
        return sum(size for _, size in self._entries.values())

    def photos(self, subject: Subject, config: TrainConfig) -> tuple[PreparedSubject, ...]:
        """The photos prepared for training: one group, or one per aspect-ratio bucket.

        Cached per subject object, because comparing large photos would take as long as preparing them.
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
        """Encoded prompts by prompt. All missing ones are encoded in one call."""
        keys = {prompt: ("prompt", base.digest, device, prompt) for prompt in prompts}
        found = {prompt: self._find(key) for prompt, key in keys.items()}
        missing = [prompt for prompt, encoded in found.items() if encoded is None]
        if missing:
            new = dict(zip(missing, base.prompts.encode(missing), strict=True))
            for prompt, encoded in new.items():
                self._keep(keys[prompt], encoded, encoded.tensors)
            found |= new
        return found

    def latents(self, base: BaseModel, images: torch.Tensor, device: str) -> torch.Tensor:
        """Latents of images.

        Args:
            images: float32 [n, 3, h, w] in 0..1.
        """
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
            return  # NaN or infinity is reported by the caller; encoding again may succeed
        self._entries[key] = (value, size)
        while self.size > self._limit:
            self._entries.popitem(last=False)
