"""Keeps what steps are made of on the device, so that a step uploads only what it draws."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import torch

from ..base.conditioning import Conditioning, concatenate

Stored = torch.Tensor | Sequence[torch.Tensor]

MOST_BYTES = 128 * 2**20
"""What is kept at most, so that the memory plan stays true: 2,000 photos of 512 pixels, or 200 prompts of SDXL. What is
beyond is uploaded each time."""


class Resident:
    """Photos, masks and prompts on the device, from their first use on.

    Args:
        encoded: all prompts, on the CPU.
        device: where everything is kept.
    """

    def __init__(self, encoded: Mapping[str, Conditioning], device: torch.device) -> None:
        self._encoded, self.device = encoded, device
        self._tensors: dict[tuple[int, int], torch.Tensor] = {}
        self._prompts: dict[str, Conditioning] = {}
        self._room = MOST_BYTES

    def one(self, stored: Stored, number: int) -> torch.Tensor:
        """Item ``number`` of a tensor or sequence on the CPU, which must not be freed meanwhile."""
        if self.device.type == "cpu":
            return stored[number]
        key = (id(stored), number)
        if key in self._tensors:
            return self._tensors[key]
        tensor = upload(stored[number], self.device)
        if self._takes(tensor.nbytes):
            self._tensors[key] = tensor
        return tensor

    def encode(self, prompts: Sequence[str]) -> Conditioning:
        """A batch of prompts, encoded by the frozen text encoder."""
        found = [self._prompt(prompt) for prompt in prompts]
        return found[0] if len(found) == 1 else concatenate(found)

    def _prompt(self, prompt: str) -> Conditioning:
        encoded = self._encoded[prompt]
        if self.device.type == "cpu":
            return encoded
        if prompt in self._prompts:
            return self._prompts[prompt]
        there = encoded.to(self.device)
        if self._takes(sum(tensor.nbytes for tensor in encoded.tensors)):
            self._prompts[prompt] = there
        return there

    def _takes(self, size: int) -> bool:
        if size > self._room:
            return False
        self._room -= size
        return True


def upload(tensor: torch.Tensor, device: torch.device) -> torch.Tensor:
    """The tensor on ``device``; from pinned memory, as any other copy to a GPU waits until the GPU is idle."""
    if device.type == "cuda" and tensor.device.type == "cpu":
        return tensor.pin_memory().to(device, non_blocking=True)
    return tensor.to(device)
