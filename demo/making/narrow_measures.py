"""All measures of a LoRA on the narrow model: subject, class, and everything else, before and after."""

from __future__ import annotations

from functools import cache
from importlib import import_module
from typing import Any

import torch

from .classes import caption, place
from .gain import CFG, PICTURES, SAMPLE_STEPS, photos
from .judge import LoadedJudge
from .judge_embedder import OTHER_CAPTIONS
from .kept_pictures import Pictures
from .measure import draw
from .measure_dreambooth import SCENES_OF_PICTURES, dreambooth_row
from .narrow import Narrow
from .subjects import SUBJECTS

# This package has two names (see files.py), and the trainer is next to it under both.
_figures: Any = import_module(f"{__name__.removesuffix('demo.making.narrow_measures')}trainer.measure.figures")

CLASS_BACKGROUNDS = (None, "beach", "blue", "striped")
"""Of the class prompts whose drift is measured; None is the plain class."""
DRIFT_SEED = 5000
"""The first seed of the pictures whose drift is measured. Each prompt has seeds of its own."""


@torch.no_grad()
def measures_of(
    nets_before: Narrow, nets_after: Narrow, judge: LoadedJudge, name: str, seeds: int = 4
) -> dict[str, float]:
    """The measures of one trained subject.

    Args:
        nets_before: the base. What is drawn with it is kept for later calls with the same nets.
        nets_after: with the trained LoRA.
        name: the subject.
        seeds: pictures of each prompt whose drift is measured.

    Returns:
        the figures of :func:`demo.making.measure_dreambooth.dreambooth_row`; ``drift_class`` and ``drift_others``, of
        CLASS_BACKGROUNDS and OTHER_CAPTIONS; ``pres`` of the plain class, and ``div`` of the plain subject. The last
        four are those of `trainer/measure/figures.py`.
    """
    word = SUBJECTS[name].class_word
    made = pictures_of_nets(nets_before, nets_after, word)
    row = {key: float(value) for key, value in dreambooth_row(judge, name, {}, made).items() if key != "subject"}
    class_captions = tuple(caption(word, background) for background in CLASS_BACKGROUNDS)
    for group, captions in {"class": class_captions, "others": OTHER_CAPTIONS}.items():
        before = _embedded_before(nets_before, judge, captions, seeds)
        row[f"drift_{group}"] = float(_figures.drift(before, _embedded(nets_after, judge, captions, seeds)).mean())
    embedded = {part: judge.classify(pictures).embedding[None] for part, pictures in made.items()}
    row["pres"] = float(_figures.pres(embedded["after"], judge.classify(photos(name, "train")).embedding).mean())
    row["div"] = float(_figures.div(embedded["like"]).mean())
    return row


def pictures_of_nets(nets_before: Narrow, nets_after: Narrow, word: str) -> Pictures:
    """The pictures that `measure_dreambooth` scores: of the class before and after, and of the subject."""
    plain, special = caption(word, None), f"a photo of ohwx {word}"
    return {
        "before": _before(nets_before, (plain,) * PICTURES, 100),
        "like": _pictures(nets_after, (special,) * PICTURES, 200),
        "scenes": _pictures(nets_after, tuple(f"{special} {place(scene)}" for scene in SCENES_OF_PICTURES), 300),
        "after": _pictures(nets_after, (plain,) * PICTURES, 100),
    }


def _pictures(nets: Narrow, captions: tuple[str, ...], first: int) -> torch.Tensor:
    """One for each caption, from the seeds *first*, *first* + 1, ..."""
    return draw(nets, list(captions), list(range(first, first + len(captions))), SAMPLE_STEPS, CFG)


@cache
def _before(nets: Narrow, captions: tuple[str, ...], first: int) -> torch.Tensor:
    return _pictures(nets, captions, first)


def _embedded(nets: Narrow, judge: LoadedJudge, captions: tuple[str, ...], seeds: int) -> torch.Tensor:
    """Embeddings [captions, seeds, d]."""
    pictures = _pictures(nets, tuple(text for text in captions for _ in range(seeds)), DRIFT_SEED)
    return judge.classify(pictures).embedding.unflatten(0, (len(captions), seeds))


@cache
def _embedded_before(nets: Narrow, judge: LoadedJudge, captions: tuple[str, ...], seeds: int) -> torch.Tensor:
    return _embedded(nets, judge, captions, seeds)
