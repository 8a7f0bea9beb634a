"""Evaluates a LoRA: draws the same prompts and seeds with and without it, and compares the pictures."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field

import torch
import torch.nn.functional as F

from ..errors import SubjectBoothError
from . import figures
from .embedding import Embedder, Namer
from .prompts import PromptSet

Draw = Callable[[str, Sequence[int], bool], torch.Tensor]
"""Draws a prompt once for each of the seeds, with the LoRA if the third argument is true. Returns float32
[seeds, 3, h, w] in 0..1, on the CPU. The same prompt and seeds must give the same pictures again."""

SHOWN_SIDE = 256
"""Pixels. Pictures are scaled down to this for the grid: 29 prompts of SDXL at full size would take 3 GB."""


@dataclass(frozen=True)
class Progress:
    """Pictures drawn so far, of all."""

    done: int
    total: int


@dataclass(frozen=True)
class Figure:
    """One measure.

    Attributes:
        per_seed: its value for each seed.
        meaning: what it is, and whether high or low is good, in a few words.
    """

    per_seed: tuple[float, ...]
    meaning: str

    @property
    def value(self) -> float:
        """The mean over the seeds."""
        return sum(self.per_seed) / len(self.per_seed)

    @property
    def error(self) -> float:
        """The standard error of the mean over the seeds."""
        count, mean = len(self.per_seed), self.value
        variance = sum((value - mean) ** 2 for value in self.per_seed) / (count - 1)
        return math.sqrt(variance / count)


@dataclass(frozen=True)
class Row:
    """The pictures of one prompt.

    Attributes:
        group: of :attr:`trainer.measure.prompts.PromptSet.groups`.
        before: without the LoRA, uint8 [seeds, 3, h, w], at most :data:`SHOWN_SIDE` on a side.
        after: with it, from the same seeds.
    """

    group: str
    prompt: str
    before: torch.Tensor = field(repr=False)
    after: torch.Tensor = field(repr=False)


@dataclass(frozen=True)
class Evaluation:
    """The result of :func:`evaluate`.

    Attributes:
        embedder: its name; empty if there was none.
        figures: by name.
        rows: the pictures, one row per prompt.
        seeds: of the pictures in every row.
        notes: sentences about figures that are left out.
    """

    embedder: str
    figures: dict[str, Figure]
    rows: tuple[Row, ...]
    seeds: tuple[int, ...]
    notes: tuple[str, ...]


def evaluate(
    draw: Draw,
    embedder: Embedder | None,
    prompts: PromptSet,
    seeds: Sequence[int],
    photos: Sequence[torch.Tensor] = (),
) -> Iterator[Progress | Evaluation]:
    """Draw all prompts, first without and then with the LoRA, and compute the figures.

    Closing the generator cancels the evaluation.

    Args:
        draw: draws pictures; see :data:`Draw`.
        embedder: compares them. If it is also a :class:`trainer.measure.embedding.Namer`, classes and scenes are
            recognised too. None: only the pictures are drawn.
        prompts: from :func:`trainer.measure.prompts.prompt_set`.
        seeds: two different ones or more.
        photos: of the subject, each float32 [3, h, w] in 0..1. Without them, the figures that need them are left out.

    Yields:
        the progress after each prompt; the :class:`Evaluation` last.

    Raises:
        SubjectBoothError: fewer than two seeds, or, at the end, the base draws the same picture from all of them.
    """
    check_seeds(seeds)
    return _evaluate(draw, embedder, prompts, tuple(seeds), photos)


def check_seeds(seeds: Sequence[int]) -> None:
    """Check the seeds before anything expensive.

    Raises:
        SubjectBoothError: fewer than two, or one twice.
    """
    if len(seeds) < 2 or len(set(seeds)) < len(seeds):
        raise SubjectBoothError(
            f"{len(set(seeds))} different seeds",
            "2 or more, to compare with the difference between two",
            "use 4",
            "seeds",
        )


def _evaluate(
    draw: Draw, embedder: Embedder | None, prompts: PromptSet, seeds: tuple[int, ...], photos: Sequence[torch.Tensor]
) -> Iterator[Progress | Evaluation]:
    total = 2 * len(seeds) * len(prompts.all)
    done = 0
    embedded_photos = torch.cat([embedder.embed(photo[None]) for photo in photos]) if photos and embedder else None
    embeddings: dict[tuple[str, bool], torch.Tensor] = {}
    shown: dict[tuple[str, bool], torch.Tensor] = {}
    named: dict[tuple[str, bool], list[str]] = {}
    choices = _choices(prompts)
    for with_lora in (False, True):
        for prompt in prompts.all:
            pictures = draw(prompt, seeds, with_lora)
            if embedder is not None:
                embeddings[prompt, with_lora] = embedder.embed(pictures)
                if isinstance(embedder, Namer) and prompt in choices:
                    named[prompt, with_lora] = embedder.names(pictures, choices[prompt])
            shown[prompt, with_lora] = _shown(pictures)
            done += len(seeds)
            yield Progress(done, total)
    rows = tuple(
        Row(group, prompt, shown[prompt, False], shown[prompt, True])
        for group, members in prompts.groups.items()
        for prompt in members
    )
    if embedder is None:
        yield Evaluation("", {}, rows, seeds, ())
        return
    found, notes = _figures(prompts, embeddings, named, embedded_photos)
    yield Evaluation(embedder.name, found, rows, seeds, tuple(notes))


def _choices(prompts: PromptSet) -> dict[str, tuple[str, ...]]:
    """What a namer chooses from, by prompt: classes for the plain class, scenes for the subject in them."""
    classes = (prompts.class_prompts[0], *prompts.others)
    return {prompts.class_prompts[0]: classes, **dict.fromkeys(prompts.subject_scenes, prompts.scenes)}


def _figures(
    prompts: PromptSet,
    embeddings: dict[tuple[str, bool], torch.Tensor],
    named: dict[tuple[str, bool], list[str]],
    photos: torch.Tensor | None,
) -> tuple[dict[str, Figure], list[str]]:
    def of(group: Sequence[str], with_lora: bool) -> torch.Tensor:
        return torch.stack([embeddings[prompt, with_lora] for prompt in group])

    def right(pairs: Sequence[tuple[str, str]], with_lora: bool) -> torch.Tensor:
        return figures.share([[name == wanted for name in named[prompt, with_lora]] for prompt, wanted in pairs])

    plain = prompts.class_prompts[:1]
    subject = (*prompts.subject, *prompts.subject_scenes)
    found: dict[str, Figure] = {}
    notes = []

    def add(name: str, per_seed: torch.Tensor, meaning: str) -> None:
        found[name] = Figure(tuple(per_seed.tolist()), meaning)

    for name, group in {"class": prompts.class_prompts, "others": prompts.others}.items():
        what = "the class" if name == "class" else "other things and scenes"
        if figures.seed_distance(of(group, False)) < 1e-6:  # drift is a multiple of it
            raise SubjectBoothError(
                f"the base draws the same picture of {what} from every seed",
                "pictures that differ",
                "look at a few of them; black ones are usually a matter of half precision",
            )
        add(
            f"drift_{name}",
            figures.drift(of(group, False), of(group, True)),
            f"change of {what}; 0 is none, 1 another random picture",
        )
    if photos is not None:
        add("subject", figures.similarity(of(prompts.subject, True), photos), "subject to photos; higher is better")
        add(
            "subject_in_scenes",
            figures.similarity(of(prompts.subject_scenes, True), photos),
            "the same in new scenes; higher is better",
        )
        for name, with_lora in {"pres_before": False, "pres": True}.items():
            meaning = "class to photos; should stay" if with_lora else "class to photos, without the LoRA"
            add(name, figures.pres(of(plain, with_lora), photos), meaning)
        add(
            "class_is_subject",
            figures.subject_share(of(plain, True), photos, of(plain, False)),
            "share of the plain class that is nearer to the photos; lower is better",
        )
    else:
        notes.append("No photos were given: subject, pres and class_is_subject are left out.")
    add("div", figures.div(of(subject, True)), "variety of the subject; higher is better")
    if named:
        add("class_before", right([(plain[0], plain[0])], False), "share of the class recognised, without the LoRA")
        add("class_after", right([(plain[0], plain[0])], True), "share of the class recognised; should stay")
        pairs = list(zip(prompts.subject_scenes, prompts.scenes, strict=True))
        add("scenes_right", right(pairs, True), "share of new scenes recognised; higher is better")
    else:
        notes.append(
            "This embedder does not recognise classes: class_before, class_after and scenes_right are left out."
        )
    return found, notes


def _shown(pictures: torch.Tensor) -> torch.Tensor:
    scale = SHOWN_SIDE / max(pictures.shape[-2:])
    if scale < 1:
        pictures = F.interpolate(pictures, scale_factor=scale, mode="area")
    return (pictures.clamp(0, 1) * 255).round().to(torch.uint8)
