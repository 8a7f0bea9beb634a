"""What each step sees: latents and prompts, and which of them with which noise.

Everything random is a function of the seed and the step, so there is no random state to save: a resumed run draws
what an uninterrupted one would have drawn.
"""

from __future__ import annotations

import hashlib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch

from .conditioning import Conditioning, concatenate
from .config import TrainConfig
from .errors import SubjectBoothError
from .loss import Batch


@dataclass(frozen=True)
class TrainingData:
    """Everything that is encoded once, before the first step, on the CPU.

    Attributes:
        latents: float32 [n, 4, h/8, w/8], the photos in the training space.
        captions: n, one a photo.
        encoded: every prompt that training or looking needs, encoded, batch size 1; the empty prompt included.
        prior_latents: float32 [m, 4, h/8, w/8], the class images; None without them.
        class_prompt: what the class images show.
        flipped_latents: like ``latents``, of the mirrored photos; None without flipping.
        masks: float32 [n, 1, h/8, w/8] in 0..1, None without a masked loss.
    """

    latents: torch.Tensor
    captions: tuple[str, ...]
    encoded: Mapping[str, Conditioning]
    prior_latents: torch.Tensor | None = None
    class_prompt: str = ""
    flipped_latents: torch.Tensor | None = None
    masks: torch.Tensor | None = None

    def encode(self, prompts: Sequence[str]) -> Conditioning:
        """A batch of prompts as the frozen text encoder gave them."""
        return concatenate([self.encoded[prompt] for prompt in prompts])

    def __post_init__(self) -> None:
        if self.prior_latents is None:
            return
        if len(self.prior_latents) == 0:
            raise SubjectBoothError("class priors without a single picture", "one or more",
                                    "make more class images, or exclude fewer", "CLASS_PRIORS")
        if self.prior_latents.shape[1:] != self.latents.shape[1:]:
            height, width = (8 * side for side in self.prior_latents.shape[2:])
            wanted = 8 * self.latents.shape[2]
            raise SubjectBoothError(
                f"class images of {width}x{height} pixels", f"the training resolution, {wanted}x{wanted}",
                f"make the class images at {wanted} pixels, or set resolution to {width}", "CLASS_PRIORS")


def derived_seed(seed: int, purpose: str, number: int) -> int:
    """A seed for one purpose and one step: 63 bits of SHA-256, so that no two of them are related."""
    return int.from_bytes(hashlib.sha256(f"{seed}/{purpose}/{number}".encode()).digest()[:8], "big") >> 1


def generator_for(seed: int, purpose: str, number: int) -> torch.Generator:
    """A CPU generator for one purpose and one step. The CPU's, so that every device sees the same noise."""
    return torch.Generator("cpu").manual_seed(derived_seed(seed, purpose, number))


def order(first: int, count: int, size: int, seed: int, purpose: str) -> list[int]:
    """Items ``first .. first+count`` of an endless sequence of shuffles of ``range(size)``: each is seen as often."""
    shuffles: dict[int, list[int]] = {}
    picked = []
    for position in range(first, first + count):
        epoch, place = divmod(position, size)
        if epoch not in shuffles:
            shuffles[epoch] = torch.randperm(size, generator=generator_for(seed, purpose, epoch)).tolist()
        picked.append(shuffles[epoch][place])
    return picked


def make_batch(
    data: TrainingData, config: TrainConfig, timesteps: int, micro_step: int, device: torch.device,
    process: int = 0, processes: int = 1,
) -> Batch:
    """The batch of one forward pass.

    Args:
        data: on the CPU.
        config: batch size and seed count.
        timesteps: length of the noise schedule.
        micro_step: forward passes done before, over the whole run.
        device: where the batch goes.
        process, processes: under ``accelerate launch`` each process takes its own part of one common draw.

    Returns:
        ``train_batch_size`` photos and, with class priors, as many class images behind them.
    """
    per_process = config.train_batch_size
    whole = per_process * processes
    own = slice(process * per_process, (process + 1) * per_process)
    parts = 1 if data.prior_latents is None else 2
    random = generator_for(config.seed, "noise", micro_step)
    noise = torch.randn((parts, whole, *data.latents.shape[1:]), generator=random)[:, own].flatten(0, 1)
    drawn = torch.randint(0, timesteps, (parts, whole), generator=random)[:, own].flatten(0, 1)

    if config.noise_offset:
        # Drawn behind everything else, so that the other noise is the same with and without it.
        noise = noise + config.noise_offset * torch.randn(
            (parts, whole, data.latents.shape[1], 1, 1), generator=random)[:, own].flatten(0, 1)

    photos = order(micro_step * whole, whole, len(data.latents), config.seed, "photos")[own]
    latents, masks = data.latents[photos], data.masks[photos] if data.masks is not None else None
    if data.flipped_latents is not None:
        mirrored = _chance(0.5, whole, config.seed, "flip", micro_step)[own]
        latents = torch.where(mirrored[:, None, None, None], data.flipped_latents[photos], latents)
        if masks is not None:
            masks = torch.where(mirrored[:, None, None, None], masks.flip(-1), masks)
    prompts = [data.captions[index] for index in photos]
    if config.caption_dropout:
        dropped = _chance(config.caption_dropout, whole, config.seed, "caption", micro_step)[own].tolist()
        prompts = ["" if drop else prompt for drop, prompt in zip(dropped, prompts, strict=True)]
    if data.prior_latents is not None:
        classes = order(micro_step * whole, whole, len(data.prior_latents), config.seed, "class images")[own]
        latents = torch.cat([latents, data.prior_latents[classes]])
        prompts += [data.class_prompt] * per_process
    return Batch(
        latents.to(device), noise.to(device), drawn.to(device), data.encode(prompts).to(device), per_process,
        masks.to(device) if masks is not None else None, tuple(prompts))


def _chance(share: float, count: int, seed: int, purpose: str, micro_step: int) -> torch.Tensor:
    """bool [count]: which of the pictures something happens to that happens to ``share`` of them."""
    return torch.rand(count, generator=generator_for(seed, purpose, micro_step)) < share
