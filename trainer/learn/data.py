"""Assembles the batches of each step: photos, prompts, noise and times.

All random numbers come from :mod:`trainer.machine.draws`, as a function of seed and step.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property
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
from .resident import Resident, upload


@dataclass(frozen=True)
class Photos:
    """Encoded photos; see :class:`TrainingData` for the shapes."""

    latents: torch.Tensor | Sequence[torch.Tensor]
    captions: tuple[str, ...]
    masks: torch.Tensor | Sequence[torch.Tensor] | None = None


@dataclass(frozen=True)
class ProbePrompts:
    """The prompts that scores compare, see :mod:`trainer.learn.probe`.

    Attributes:
        subject: such as "a photo of ohwx dog".
        class_prompt: such as "a photo of a dog".
        subject_in_scenes, class_in_scenes: the same with the words of each scene.
    """

    subject: str
    class_prompt: str
    subject_in_scenes: tuple[str, ...]
    class_in_scenes: tuple[str, ...]

    @property
    def all(self) -> tuple[str, ...]:
        """All of them."""
        return (self.subject, self.class_prompt, *self.subject_in_scenes, *self.class_in_scenes)


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
        probe: the prompts for scores; None for no scores.
        held_out: pictures of the subject that are scored but not trained on; None for none.
    """

    latents: torch.Tensor | Sequence[torch.Tensor]
    captions: tuple[str, ...]
    encoded: Mapping[str, Conditioning]
    preservation: Preservation = field(default_factory=NoPreservation)
    flipped_latents: torch.Tensor | Sequence[torch.Tensor] | None = None
    masks: torch.Tensor | Sequence[torch.Tensor] | None = None
    names: tuple[str, ...] = ()
    square: tuple[int, ...] = ()
    probe: ProbePrompts | None = None
    held_out: Photos | None = None

    def __post_init__(self) -> None:
        if not self.square:
            object.__setattr__(self, "square", tuple(self.latents[0].shape))

    def encode(self, prompts: Sequence[str]) -> Conditioning:
        """A batch of prompts, encoded by the frozen text encoder."""
        return concatenate([self.encoded[prompt] for prompt in prompts])

    @property
    def photos(self) -> Photos:
        """The photos that are trained on."""
        return Photos(self.latents, self.captions, self.masks)

    @cached_property
    def buckets(self) -> list[list[int]]:
        """The numbers of the photos, grouped by size."""
        found: dict[torch.Size, list[int]] = {}
        for number, latents in enumerate(self.latents):
            found.setdefault(latents.shape, []).append(number)
        return list(found.values())

    @cached_property
    def pools(self) -> list[list[torch.Tensor]]:
        """The latents [c, h, w] of the photos of each bucket."""
        return [[self.latents[number] for number in bucket] for bucket in self.buckets]


@dataclass(frozen=True)
class _Turn:
    """What a micro-step is about.

    Attributes:
        bucket: the numbers of the photos to draw from.
        pool: their latents.
        purpose: the random stream of the bucket's photos.
        batches: number of earlier batches of this bucket.
        all_batches: number of earlier batches of each bucket.
    """

    bucket: list[int]
    pool: list[torch.Tensor]
    purpose: str
    batches: int
    all_batches: tuple[int, ...]


def _turn(data: TrainingData, micro_step: int, seed: int) -> _Turn:
    """With buckets, a photo drawn from an endless sequence of shuffles selects its bucket."""
    buckets = data.buckets
    if len(buckets) == 1:
        return _Turn(buckets[0], data.pools[0], "photos", micro_step, (micro_step,))
    total = len(data.latents)
    epoch, place = divmod(micro_step, total)
    drawn = shuffled_indices(epoch * total, place + 1, total, seed, "buckets")
    number = next(index for index, bucket in enumerate(buckets) if drawn[-1] in bucket)
    # Earlier batches of a bucket: one per photo and finished epoch, and those of this epoch.
    before = tuple(epoch * len(bucket) + sum(photo in bucket for photo in drawn[:-1]) for bucket in buckets)
    return _Turn(buckets[number], data.pools[number], f"photos {number}", before[number], before)


def _photos_in(way: Preservation, batches: int, train_batch_size: int) -> int:
    """The number of photos in so many batches of a bucket."""
    return batches * train_batch_size - batches // way.every * way.replaces(train_batch_size)


def photos_of(data: TrainingData, train_batch_size: int, micro_step: int, seed: int) -> list[int]:
    """The numbers of the photos of one batch, all of one size.

    Without buckets, these are the next ones of an endless sequence of shuffles. With buckets, they are the next ones of
    the sequence of the micro-step's bucket. So a bucket is used in proportion to its photos, and all photos are used
    equally often.
    """
    return _numbers(_turn(data, micro_step, seed), data.preservation, train_batch_size, seed)


def _numbers(turn: _Turn, way: Preservation, train_batch_size: int, seed: int) -> list[int]:
    first, last = (_photos_in(way, turn.batches + more, train_batch_size) for more in (0, 1))
    numbers = shuffled_indices(first, last - first, len(turn.bucket), seed, turn.purpose)
    return [turn.bucket[number] for number in numbers]


def make_micro_step(
    data: TrainingData,
    config: TrainConfig,
    denoiser: Denoiser,
    micro_step: int,
    device: torch.device,
    resident: Resident | None = None,
) -> MicroStep:
    """One batch: ``train_batch_size`` photos, and the images that class preservation adds or puts in their place.

    Args:
        data: the encoded data, on the CPU.
        config: uses the batch size, loss weights and seed.
        micro_step: number of batches so far in the run.
        device: device of the batch.
        resident: what is on the device already; None for nothing.
    """
    resident = resident or Resident(data.encoded, device)
    way, weight, seed = data.preservation, config.prior_loss_weight, config.seed
    turn = _turn(data, micro_step, seed)
    numbers = _numbers(turn, way, config.train_batch_size, seed)
    before = sum(_photos_in(way, batches, config.train_batch_size) for batches in turn.all_batches)
    draws = Draws(seed, micro_step, len(numbers), before)
    photos = _photos(data, resident, config, draws, numbers, turn.pool)
    parts, added_draws = [photos] if numbers else [], draws
    if turn.batches % way.every == way.every - 1:
        count = way.pictures(config.train_batch_size)
        before = count * sum(batches // way.every for batches in turn.all_batches)
        added_draws = Draws(seed, micro_step, count, before)
        parts += way.parts(photos, added_draws, weight)
    terms: dict[str, Term] = {}
    for part in parts:
        pictures = terms[part.loss].pictures if part.loss in terms else 0
        photo_loss = way.photo_loss(weight) if part is photos else None
        terms[part.loss] = Term(part.loss, part.weight, pictures + len(part.latents), photo_loss)
    return MicroStep(_batches(resident, config, denoiser, draws, added_draws, parts), tuple(terms.values()))


def make_study_batch(
    data: TrainingData, seed: int, denoiser: Denoiser, numbers: Sequence[int], device: torch.device
) -> Batch:
    """Images for which the base is studied before training, see :attr:`Preservation.study_images`.

    Args:
        numbers: of the images, from 0; all get the size of one bucket.
    """
    part = data.preservation.study(seed, numbers, data.pools[numbers[0] % len(data.pools)])
    assert part.noise is not None and part.uniform is not None
    return _batch(Resident(data.encoded, device), [part], {id(part): (part.noise, denoiser.times(part.uniform))})


def _photos(
    data: TrainingData,
    resident: Resident,
    config: TrainConfig,
    draws: Draws,
    numbers: list[int],
    pool: list[torch.Tensor],
) -> Part:
    if not numbers:
        return Part(INSTANCE_LOSS, 1.0, pool[0].new_empty(0, *pool[0].shape), (), (), "timesteps", pool=pool)
    one = resident.one
    latents = [one(data.latents, number) for number in numbers]
    masks = [] if data.masks is None else [one(data.masks, number) for number in numbers]
    if data.flipped_latents is not None:
        mirrored = draws.bernoulli(0.5, "flip").tolist()
        flipped = [one(data.flipped_latents, number) for number in numbers]
        latents = [flipped[row] if mirrored[row] else plain for row, plain in enumerate(latents)]
        masks = [mask.flip(-1) if mirrored[row] else mask for row, mask in enumerate(masks)]
    prompts = [data.captions[number] for number in numbers]
    if config.caption_dropout:
        dropped = draws.bernoulli(config.caption_dropout, "caption").tolist()
        prompts = ["" if drop else prompt for drop, prompt in zip(dropped, prompts, strict=True)]
    labels = [data.names[number] if data.names else f"photo {number + 1}" for number in numbers]
    return Part(
        INSTANCE_LOSS,
        1.0,
        _stacked(latents),
        prompts,
        labels,
        "timesteps",
        _stacked(masks) if masks else None,
        pool=pool,
    )


def _batches(
    resident: Resident,
    config: TrainConfig,
    denoiser: Denoiser,
    draws: Draws,
    added_draws: Draws,
    parts: Sequence[Part],
) -> list[Batch]:
    """Add noise and times to the parts; parts of one size share a forward pass."""
    drawn = [part for part in parts if part.like is None and part.noise is None]
    noise = iter(draws.noise([tuple(part.latents.shape[1:]) for part in drawn], config.noise_offset))
    times: dict[str, torch.Tensor] = {}
    own: dict[int, tuple[torch.Tensor, torch.Tensor]] = {}
    for part in parts:
        if part.like is not None:
            continue
        if part.uniform is not None:
            chosen = denoiser.times(part.uniform)
        else:
            if part.purpose not in times:
                uniform = (draws if part.loss == INSTANCE_LOSS else added_draws).uniform(part.purpose)
                times[part.purpose] = denoiser.times(uniform)
            chosen = times[part.purpose]
        own[id(part)] = (next(noise) if part.noise is None else part.noise, chosen)
    together: dict[tuple[int, ...], list[Part]] = {}
    for part in parts:
        together.setdefault(tuple(part.latents.shape[1:]), []).append(part)
    return [_batch(resident, same_size, own) for same_size in together.values()]


def _batch(resident: Resident, parts: Sequence[Part], own: Mapping[int, tuple[torch.Tensor, torch.Tensor]]) -> Batch:
    """Concatenate the parts, on the device."""
    device = resident.device
    drawn = [own[id(part.like or part)] for part in parts]
    prompts = [prompt for part in parts for prompt in part.prompts]
    masked = [part.masks for part in parts if part.masks is not None]
    from_base = tuple(part.from_base for part in parts for _ in part.prompts)
    keys = tuple(key for part in parts for key in part.keys or [None] * len(part.prompts))
    return Batch(
        _concatenated([upload(part.latents, device) for part in parts]),
        upload(_concatenated([noise for noise, _ in drawn]), device),
        upload(_concatenated([times for _, times in drawn]), device),
        resident.encode(prompts),
        tuple(part.loss for part in parts for _ in part.prompts),
        _concatenated([upload(masks, device) for masks in masked]) if masked else None,
        tuple(prompts),
        tuple(label for part in parts for label in part.labels),
        from_base if any(from_base) else (),
        keys=keys if any(part.keys for part in parts) else (),
    )


def _concatenated(tensors: Sequence[torch.Tensor]) -> torch.Tensor:
    return tensors[0] if len(tensors) == 1 else torch.cat(list(tensors))


def _stacked(tensors: Sequence[torch.Tensor]) -> torch.Tensor:
    return tensors[0][None] if len(tensors) == 1 else torch.stack(list(tensors))


def largest_load(data: TrainingData, train_batch_size: int) -> Load:
    """The inputs of the largest step of a run, for the memory plan."""
    way = data.preservation
    sizes = {tuple(latents.shape[1:]) for latents in data.latents} | {data.square[1:]}
    height, width = max(sizes, key=math.prod)
    added, replaced = way.pictures(train_batch_size), way.replaces(train_batch_size)
    pictures = max(train_batch_size + added - replaced, 0 if way.every == 1 else train_batch_size)
    photos = train_batch_size if way.every > 1 else train_batch_size - replaced
    captions, prompts = (_tokens(data, given) for given in (data.captions, way.prompts))
    # In a batch, prompts are repeated to the least common multiple of their lengths.
    together = (
        [*one, *other] for one in _chosen(captions, photos) for other in _chosen(prompts, min(added, len(prompts)))
    )
    longest = max((data.encode(chosen) for chosen in together), key=lambda found: found.tokens)
    text_tokens = sum(
        sum(sorted(tokens.values(), reverse=True)[:most]) for tokens, most in ((captions, photos), (prompts, added))
    )
    return Load(longest.first, (height, width), pictures, text_tokens, way.study_images > 0)


def _tokens(data: TrainingData, prompts: Sequence[str]) -> dict[str, int]:
    return {prompt: data.encoded[prompt].tokens for prompt in prompts if prompt in data.encoded}


def _chosen(tokens: Mapping[str, int], most: int) -> Iterable[tuple[str, ...]]:
    """Prompts of every combination of lengths that can meet in one batch."""
    lengths = {length: prompt for prompt, length in tokens.items()}
    return combinations(lengths.values(), min(most, len(lengths)))
