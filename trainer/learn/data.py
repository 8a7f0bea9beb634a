"""Assembles the batches of each step: photos, prompts, noise and times.

All random numbers come from :mod:`trainer.machine.draws`, as a function of seed and step.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from itertools import combinations

import torch

from ..base.conditioning import Conditioning, concatenate
from ..base.denoiser import Denoiser
from ..config import TrainConfig
from ..machine.draws import Draws, shuffled_indices
from ..memory.plan import Load
from ..preserve.none import NoPreservation
from ..preserve.preservation import Part, Preservation
from .batch import Batch, MicroStep, Term
from .loss import INSTANCE_LOSS


@dataclass(frozen=True)
class TrainingData:
    """Everything that is encoded once before the first step, on the CPU.

    Photos of one size are in one tensor; photos of several sizes (aspect-ratio buckets) in a sequence.

    Attributes:
        latents: latents of the photos, float32 [n, c, h, w] or n times [c, h, w], scaled for the network.
        captions: one per photo, n.
        encoded: all prompts for training and validation, including the empty one, encoded with batch size 1.
        preservation: the method of class preservation.
        flipped_latents: latents of the mirrored photos, shaped like ``latents``; None without flipping.
        masks: float32 [n, 1, h, w] or n times [1, h, w], in 0..1; None without masked loss.
        names: names of the photos in messages, n; may be empty.
        square: (c, h, w) of class images and validation images; empty for the photos' size.
    """

    latents: torch.Tensor | Sequence[torch.Tensor]
    captions: tuple[str, ...]
    encoded: Mapping[str, Conditioning]
    preservation: Preservation = field(default_factory=NoPreservation)
    flipped_latents: torch.Tensor | Sequence[torch.Tensor] | None = None
    masks: torch.Tensor | Sequence[torch.Tensor] | None = None
    names: tuple[str, ...] = ()
    square: tuple[int, ...] = ()

    def __post_init__(self) -> None:
        if not self.square:
            object.__setattr__(self, "square", tuple(self.latents[0].shape))

    def encode(self, prompts: Sequence[str]) -> Conditioning:
        """A batch of prompts, encoded by the frozen text encoder."""
        return concatenate([self.encoded[prompt] for prompt in prompts])

    @property
    def buckets(self) -> list[list[int]]:
        """The numbers of the photos, grouped by size."""
        found: dict[torch.Size, list[int]] = {}
        for number, latents in enumerate(self.latents):
            found.setdefault(latents.shape, []).append(number)
        return list(found.values())


def photos_of(data: TrainingData, first: int, count: int, micro_step: int, seed: int) -> list[int]:
    """The numbers of the photos of one batch, all of one size.

    Without buckets, these are the next ``count`` of an endless sequence of shuffles. With buckets, a photo drawn from
    such a sequence selects its bucket, and the batch is the next ``count`` of the bucket's own sequence. So a bucket is
    used in proportion to its photos, and all photos are used equally often.

    Args:
        first: number of photos drawn so far in the run.
        micro_step: number of batches drawn so far in the run.
    """
    buckets = data.buckets
    if len(buckets) == 1:
        return shuffled_indices(first, count, len(data.latents), seed, "photos")
    total = len(data.latents)
    epoch, place = divmod(micro_step, total)
    drawn = shuffled_indices(epoch * total, place + 1, total, seed, "buckets")
    number = next(index for index, bucket in enumerate(buckets) if drawn[-1] in bucket)
    bucket = buckets[number]
    # Earlier batches of this bucket: one per photo and finished epoch, and those of this epoch.
    before = epoch * len(bucket) + sum(photo in bucket for photo in drawn[:-1])
    return [bucket[index] for index in shuffled_indices(before * count, count, len(bucket), seed, f"photos {number}")]


def make_micro_step(
    data: TrainingData,
    config: TrainConfig,
    denoiser: Denoiser,
    micro_step: int,
    device: torch.device,
    process: int = 0,
    processes: int = 1,
) -> MicroStep:
    """One batch: ``train_batch_size`` photos, and the images that class preservation adds.

    Args:
        data: the encoded data, on the CPU.
        config: uses the batch size, loss weights and seed.
        micro_step: number of batches so far in the run.
        device: device of the batch.
        process, processes: under ``accelerate launch`` each process takes its part of a common draw.
    """
    count = config.train_batch_size
    draws = Draws(config.seed, micro_step, count * processes, slice(process * count, (process + 1) * count))
    photos = _photos(data, config, draws)
    parts = [photos, *data.preservation.parts(photos, draws, config.prior_loss_weight)]
    terms: dict[str, Term] = {}
    for part in parts:
        before = terms[part.loss].pictures if part.loss in terms else 0
        terms[part.loss] = Term(part.loss, part.weight, before + len(part.latents))
    return MicroStep(_batches(data, config, denoiser, draws, parts, device), tuple(terms.values()))


def _photos(data: TrainingData, config: TrainConfig, draws: Draws) -> Part:
    numbers = photos_of(data, draws.first, draws.batch_size, draws.micro_step, draws.seed)[draws.local]
    latents, masks = _gathered(data.latents, numbers), None if data.masks is None else _gathered(data.masks, numbers)
    if data.flipped_latents is not None:
        mirrored = draws.bernoulli(0.5, "flip")
        latents = torch.where(mirrored[:, None, None, None], _gathered(data.flipped_latents, numbers), latents)
        if masks is not None:
            masks = torch.where(mirrored[:, None, None, None], masks.flip(-1), masks)
    prompts = [data.captions[number] for number in numbers]
    if config.caption_dropout:
        dropped = draws.bernoulli(config.caption_dropout, "caption").tolist()
        prompts = ["" if drop else prompt for drop, prompt in zip(dropped, prompts, strict=True)]
    labels = [data.names[number] if data.names else f"photo {number + 1}" for number in numbers]
    return Part(INSTANCE_LOSS, 1.0, latents, prompts, labels, "timesteps", masks)


def _batches(
    data: TrainingData,
    config: TrainConfig,
    denoiser: Denoiser,
    draws: Draws,
    parts: Sequence[Part],
    device: torch.device,
) -> list[Batch]:
    """Add noise and times to the parts; parts of one size share a forward pass."""
    drawn = [part for part in parts if part.like is None]
    noise = draws.noise([tuple(part.latents.shape[1:]) for part in drawn], config.noise_offset)
    times = {purpose: denoiser.times(draws.uniform(purpose)) for purpose in dict.fromkeys(p.purpose for p in drawn)}
    own = {id(part): (noise[number], times[part.purpose]) for number, part in enumerate(drawn)}
    together: dict[tuple[int, ...], list[Part]] = {}
    for part in parts:
        together.setdefault(tuple(part.latents.shape[1:]), []).append(part)
    return [_batch(data, same_size, own, device) for same_size in together.values()]


def _batch(
    data: TrainingData,
    parts: Sequence[Part],
    own: Mapping[int, tuple[torch.Tensor, torch.Tensor]],
    device: torch.device,
) -> Batch:
    """Concatenate the parts."""
    drawn = [own[id(part.like or part)] for part in parts]
    prompts = [prompt for part in parts for prompt in part.prompts]
    masked = [part.masks for part in parts if part.masks is not None]
    from_base = tuple(part.from_base for part in parts for _ in part.prompts)
    return Batch(
        _concatenated([part.latents for part in parts]).to(device),
        _concatenated([noise for noise, _ in drawn]).to(device),
        _concatenated([times for _, times in drawn]).to(device),
        data.encode(prompts).to(device),
        tuple(part.loss for part in parts for _ in part.prompts),
        _concatenated(masked).to(device) if masked else None,
        tuple(prompts),
        tuple(label for part in parts for label in part.labels),
        from_base if any(from_base) else (),
    )


def _concatenated(tensors: Sequence[torch.Tensor]) -> torch.Tensor:
    return tensors[0] if len(tensors) == 1 else torch.cat(list(tensors))


def _gathered(stored: torch.Tensor | Sequence[torch.Tensor], numbers: list[int]) -> torch.Tensor:
    return torch.stack([stored[number] for number in numbers])


def largest_load(data: TrainingData, train_batch_size: int) -> Load:
    """The inputs of the largest step of a run, for the memory plan."""
    sizes = {tuple(latents.shape[1:]) for latents in data.latents} | {data.square[1:]}
    height, width = max(sizes, key=math.prod)
    captions = {caption: data.encoded[caption].hidden_states.shape[1] for caption in data.captions}
    lengths = {length: caption for caption, length in captions.items()}
    always = list(data.preservation.prompts)
    # In a batch, prompts are repeated to the least common multiple of their lengths.
    together = (
        [*always, *(lengths[length] for length in chosen)]
        for chosen in combinations(lengths, min(train_batch_size, len(lengths)))
    )
    longest = max((data.encode(prompts) for prompts in together), key=lambda found: found.hidden_states.shape[1])
    text_tokens = sum(sorted(captions.values(), reverse=True)[:train_batch_size])
    text_tokens += sum(data.encoded[prompt].hidden_states.shape[1] for prompt in always)
    return Load(
        longest.first, (height, width), train_batch_size + data.preservation.pictures(train_batch_size), text_tokens
    )
