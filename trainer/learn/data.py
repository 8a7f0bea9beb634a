"""What each step sees: latents and prompts, and which of them with which noise.

Everything random is a function of the seed and the step, so there is no random state to save: a resumed run draws
what an uninterrupted one would have drawn.
"""

from __future__ import annotations

import hashlib
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import combinations

import torch

from ..base.conditioning import Conditioning, concatenate
from ..config import TrainConfig
from ..errors import SubjectBoothError
from ..memory.plan import Load
from .loss import Batch

GOLDEN_SECTION = (5**0.5 - 1) / 2


@dataclass(frozen=True)
class TrainingData:
    """Everything that is encoded once, before the first step, on the CPU.

    Photos of one size lie in one tensor; with aspect-ratio buckets they have several, and lie in a tuple.

    Attributes:
        latents: float32 [n, 4, h/8, w/8], the photos in the training space; or n times [4, h/8, w/8].
        captions: n, one a photo.
        encoded: every prompt that training or looking needs, encoded, batch size 1; the empty prompt included.
        prior_latents: float32 [m, 4, h/8, w/8], the class images; None without them.
        class_prompt: what the class images show.
        flipped_latents: like ``latents``, of the mirrored photos; None without flipping.
        masks: float32 [n, 1, h/8, w/8] in 0..1, or n times [1, h/8, w/8]; None without a masked loss.
        names: n labels for messages, empty without.
        resolution: pixels; needed with buckets only, where the photos do not say it.
    """

    latents: torch.Tensor | Sequence[torch.Tensor]
    captions: tuple[str, ...]
    encoded: Mapping[str, Conditioning]
    prior_latents: torch.Tensor | None = None
    class_prompt: str = ""
    flipped_latents: torch.Tensor | Sequence[torch.Tensor] | None = None
    masks: torch.Tensor | Sequence[torch.Tensor] | None = None
    names: tuple[str, ...] = ()
    resolution: int = 0

    def encode(self, prompts: Sequence[str]) -> Conditioning:
        """A batch of prompts as the frozen text encoder gave them."""
        return concatenate([self.encoded[prompt] for prompt in prompts])

    @property
    def square(self) -> tuple[int, ...]:
        """[4, h/8, w/8] of class images and validation pictures."""
        side = self.resolution // 8
        return (4, side, side) if self.resolution else tuple(self.latents[0].shape)

    @property
    def buckets(self) -> list[list[int]]:
        """Photos by number, those of one size together."""
        found: dict[torch.Size, list[int]] = {}
        for number, latents in enumerate(self.latents):
            found.setdefault(latents.shape, []).append(number)
        return list(found.values())

    def __post_init__(self) -> None:
        if self.prior_latents is None:
            return
        if len(self.prior_latents) == 0:
            raise SubjectBoothError(
                "class priors without a single picture",
                "one or more",
                "make more class images, or exclude fewer",
                "CLASS_PRIORS",
            )
        if tuple(self.prior_latents.shape[1:]) != self.square:
            height, width = (8 * side for side in self.prior_latents.shape[2:])
            wanted = 8 * self.square[1]
            raise SubjectBoothError(
                f"class images of {width}x{height} pixels",
                f"the training resolution, {wanted}x{wanted}",
                f"make the class images at {wanted} pixels, or set resolution to {width}",
                "CLASS_PRIORS",
            )


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


def spread_timesteps(first: int, count: int, length: int, seed: int, purpose: str) -> torch.Tensor:
    """Timesteps ``first .. first+count`` of an endless sequence that covers ``range(length)`` evenly, int64 [count].

    Every stretch of the sequence is spread as evenly as its length allows: a start that the seed chooses, then steps of
    the golden section, modulo 1 (Kronecker's sequence). Each timestep is as likely as with independent draws, but the
    few pictures of a small batch, and of the steps that the optimizer averages over, no longer happen to be all noise
    or none: most of a step's randomness is in its timesteps. (Within one batch: arXiv 2107.00630.)
    """
    start = torch.rand((), generator=generator_for(seed, purpose, 0), dtype=torch.float64)
    places = (start + GOLDEN_SECTION * torch.arange(first, first + count, dtype=torch.float64)) % 1.0
    return (places * length).long().clamp(max=length - 1)


def photos_of(data: TrainingData, first: int, count: int, micro_step: int, seed: int) -> list[int]:
    """The photos of one batch, all of one size.

    Without buckets they are the next ``count`` of one endless sequence of shuffles. With them a photo is drawn from
    such a sequence, and the next ``count`` of its bucket's own sequence are the batch: so a bucket comes up as often as
    it has photos, and every photo is seen as often as every other.

    Args:
        first: pictures drawn before, over the whole run.
        micro_step: batches drawn before.
    """
    buckets = data.buckets
    if len(buckets) == 1:
        return order(first, count, len(data.latents), seed, "photos")
    total = len(data.latents)
    epoch, place = divmod(micro_step, total)
    drawn = order(epoch * total, place + 1, total, seed, "buckets")
    number = next(index for index, bucket in enumerate(buckets) if drawn[-1] in bucket)
    bucket = buckets[number]
    # Batches that this bucket had before: all of its photos in each epoch that is over, and those of this one.
    before = epoch * len(bucket) + sum(photo in bucket for photo in drawn[:-1])
    return [bucket[index] for index in order(before * count, count, len(bucket), seed, f"photos {number}")]


def make_batches(
    data: TrainingData,
    config: TrainConfig,
    timesteps: int,
    micro_step: int,
    device: torch.device,
    process: int = 0,
    processes: int = 1,
) -> list[Batch]:
    """One batch: ``train_batch_size`` photos and, with class priors, as many class images behind them.

    Args:
        data: on the CPU.
        config: batch size and seed count.
        timesteps: length of the noise schedule.
        micro_step: batches done before, over the whole run.
        device: where the batch goes.
        process, processes: under ``accelerate launch`` each process takes its own part of one common draw.

    Returns:
        One :class:`Batch`; or two, photos and class images, where their sizes differ and they cannot share a forward
        pass.
    """
    per_process = config.train_batch_size
    whole = per_process * processes
    own = slice(process * per_process, (process + 1) * per_process)
    first = micro_step * whole
    photos = photos_of(data, first, whole, micro_step, config.seed)[own]
    sizes = [tuple(data.latents[photos[0]].shape)]
    sizes += [tuple(data.prior_latents.shape[1:])] if data.prior_latents is not None else []

    random = generator_for(config.seed, "noise", micro_step)
    noise = _noise(random, sizes, whole, own)
    drawn = torch.stack(
        [
            spread_timesteps(first, whole, timesteps, config.seed, purpose)
            for purpose in ("timesteps", "class timesteps")[: len(sizes)]
        ]
    )[:, own]
    if config.noise_offset:
        # Drawn behind everything else, so that the other noise is the same with and without it.
        offset = config.noise_offset * torch.randn((len(sizes), whole, sizes[0][0], 1, 1), generator=random)[:, own]
        noise = [part + shift for part, shift in zip(noise, offset, strict=True)]

    latents, masks = _picked(data.latents, photos), None if data.masks is None else _picked(data.masks, photos)
    if data.flipped_latents is not None:
        mirrored = _chance(0.5, whole, config.seed, "flip", micro_step)[own]
        latents = torch.where(mirrored[:, None, None, None], _picked(data.flipped_latents, photos), latents)
        if masks is not None:
            masks = torch.where(mirrored[:, None, None, None], masks.flip(-1), masks)
    prompts = [data.captions[index] for index in photos]
    if config.caption_dropout:
        dropped = _chance(config.caption_dropout, whole, config.seed, "caption", micro_step)[own].tolist()
        prompts = ["" if drop else prompt for drop, prompt in zip(dropped, prompts, strict=True)]
    labels = [data.names[index] if data.names else f"photo {index + 1}" for index in photos]

    def batch(
        latents: torch.Tensor,
        noise: torch.Tensor,
        drawn: torch.Tensor,
        prompts: list[str],
        instances: int,
        labels: list[str],
    ) -> Batch:
        return Batch(
            latents.to(device),
            noise.to(device),
            drawn.to(device),
            data.encode(prompts).to(device),
            instances,
            masks.to(device) if masks is not None and instances else None,
            tuple(prompts),
            tuple(labels),
        )

    if data.prior_latents is None:
        return [batch(latents, noise[0], drawn[0], prompts, per_process, labels)]
    classes = order(first, whole, len(data.prior_latents), config.seed, "class images")[own]
    priors, class_prompts = data.prior_latents[classes], [data.class_prompt] * per_process
    class_labels = [f"class image {index + 1}" for index in classes]
    if sizes[0] != sizes[1]:
        return [
            batch(latents, noise[0], drawn[0], prompts, per_process, labels),
            batch(priors, noise[1], drawn[1], class_prompts, 0, class_labels),
        ]
    return [
        batch(
            torch.cat([latents, priors]),
            torch.cat(list(noise)),
            drawn.flatten(),
            prompts + class_prompts,
            per_process,
            labels + class_labels,
        )
    ]


def _noise(
    random: torch.Generator,
    sizes: list[tuple[int, ...]],
    whole: int,
    own: slice,
) -> Sequence[torch.Tensor]:
    """Noise [own, 4, h/8, w/8] for photos and class images; drawn at once where they have one size."""
    if len(set(sizes)) == 1:
        return list(torch.randn((len(sizes), whole, *sizes[0]), generator=random)[:, own])
    return [torch.randn((whole, *size), generator=random)[own] for size in sizes]


def _picked(stored: torch.Tensor | Sequence[torch.Tensor], numbers: list[int]) -> torch.Tensor:
    return torch.stack([stored[number] for number in numbers])


def _chance(share: float, count: int, seed: int, purpose: str, micro_step: int) -> torch.Tensor:
    """bool [count]: which of the pictures something happens to that happens to ``share`` of them."""
    return torch.rand(count, generator=generator_for(seed, purpose, micro_step)) < share


def largest_load(data: TrainingData, train_batch_size: int) -> Load:
    """What the largest step of a run takes in."""
    sizes = {tuple(latents.shape[1:]) for latents in data.latents} | {data.square[1:]}
    height, width = max(sizes, key=math.prod)
    has_class = data.prior_latents is not None
    captions = {caption: data.encoded[caption].hidden_states.shape[1] for caption in data.captions}
    lengths = {length: caption for caption, length in captions.items()}
    always = [data.class_prompt] if has_class else []
    # In one batch the shorter prompts are repeated, to a length that all of theirs divide.
    together = (
        [*always, *(lengths[length] for length in chosen)]
        for chosen in combinations(lengths, min(train_batch_size, len(lengths)))
    )
    longest = max((data.encode(prompts) for prompts in together), key=lambda found: found.hidden_states.shape[1])
    text_tokens = sum(sorted(captions.values(), reverse=True)[:train_batch_size])
    text_tokens += sum(data.encoded[prompt].hidden_states.shape[1] for prompt in always)
    return Load(longest.first, (height, width), (2 if has_class else 1) * train_batch_size, text_tokens)
