"""Every way to keep the class on the narrow model, over subjects and seeds: what it keeps, learns and costs.

``python -m demo.making.ways [way ...]`` trains and measures (about a minute a run on one core; every run is saved,
so that it can be interrupted, and several processes can share the work). The figures are those of
:func:`demo.making.narrow_measures.measures_of`; the seconds are processor time of the training in one thread.
"""

from __future__ import annotations

import argparse
import json
import logging
import os
import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch

from .build import WORK
from .files import atomic_path
from .judge import LoadedJudge
from .measure_dreambooth import CLASS_IMAGES
from .narrow import Narrow, load_narrow
from .narrow_dreambooth import SEEDS, class_images_of, training_of
from .narrow_measures import measures_of
from .subjects import SUBJECTS
from .t_lora import MaskedNetwork, mean_over_masks

logger = logging.getLogger("subjectbooth")

FOLDER = WORK / "ways"
NAMES = ("dog", "clock", "cat", "robot", "rocket", "teddy_bear")
"""The subjects: different enough, and each needs half an hour for all ways and seeds."""
DRIFT_SEEDS = 2
Make = Callable[[str, Any], Any]
"""From class word and class images to the way."""


def ways() -> dict[str, tuple[Make, dict[str, Any]]]:
    """By name: how it is made, and the settings that differ."""
    from trainer.preserve.class_images import ClassImages
    from trainer.preserve.curvature import Curvature
    from trainer.preserve.dco import DirectConsistency
    from trainer.preserve.none import NoPreservation
    from trainer.preserve.teacher import Teacher
    from trainer.preserve.weight_l2 import WeightL2

    class MaskedCurvature(Curvature):
        """Penalises what the ranks in use change, on average over time, and not what all of them change together."""

        def penalty(self, layers: Any, weight: float, estimate: Any) -> dict[str, torch.Tensor]:
            (name,) = self.losses
            return {
                name: mean_over_masks(
                    lambda some: super(MaskedCurvature, self).penalty(some, weight, estimate)[name], layers
                )
            }

    classes = {"class_images": CLASS_IMAGES}
    attention = {"lora_targets": "attention"}
    return {
        "none": (lambda word, priors: NoPreservation(), {}),
        "none, attention": (lambda word, priors: NoPreservation(), attention),
        "class_images": (lambda word, priors: ClassImages(priors), {**classes, "prior_loss_weight": 0.5}),
        "teacher": (lambda word, priors: Teacher(word), {}),
        "teacher, 2 more": (lambda word, priors: Teacher(word, images=2, replaced=0), {}),
        "teacher, 2 more, attention": (
            lambda word, priors: Teacher(word, images=2, replaced=0),
            {**attention, "learning_rate": 1e-3},
        ),
        "weight_l2": (lambda word, priors: WeightL2(), {}),
        "weight_l2, as in the paper": (lambda word, priors: WeightL2(50.0), {}),
        "dco": (lambda word, priors: DirectConsistency(), {}),
        "none, T-LoRA": (lambda word, priors: NoPreservation(), {"t_lora": True}),
        "curvature, T-LoRA": (lambda word, priors: Curvature(word), {"t_lora": True}),
        "curvature of masked ranks, T-LoRA": (lambda word, priors: MaskedCurvature(word), {"t_lora": True}),
        "curvature": (lambda word, priors: Curvature(word), {}),
        "curvature, weight 128": (lambda word, priors: Curvature(word, weight=128.0), {}),
        "curvature, 32 images": (lambda word, priors: Curvature(word, images=32), {}),
        "curvature, attention": (lambda word, priors: Curvature(word), attention),
        "curvature, with class images": (lambda word, priors: Curvature(word, priors), {"class_images": 8}),
    }


def train(nets: Narrow, name: str, seed: int, make: Make, changes: dict[str, Any]) -> tuple[Narrow, dict[str, float]]:
    """The nets after a training, and its seconds: for class images, before the first step, and for each step."""
    from trainer.events import Started, StepDone

    settings = {"prior_loss_weight": 1.0, **changes}
    count = settings.pop("class_images", 0)
    began = time.process_time()
    priors = class_images_of(nets, name, seed, count) if count else None
    seconds = {"drawing": time.process_time() - began}
    way = make(SUBJECTS[name].class_word, priors)
    with training_of(nets, name, seed, way, **settings) as training:
        for event in training.events():
            if isinstance(event, Started):
                began = time.process_time()
            elif isinstance(event, StepDone) and event.step == 1:
                seconds["before"], began = time.process_time() - began, time.process_time()
        seconds["steps"] = time.process_time() - began
        return replace(nets, unet=training.averaged_network()), seconds


def run(chosen: list[str], names: list[str], seeds: list[int], folder: Path = FOLDER) -> None:
    """Train and measure what is missing. A run that another process has begun is left to it."""
    torch.set_num_threads(1)
    folder.mkdir(parents=True, exist_ok=True)
    nets, judge, known = load_narrow(), LoadedJudge(), ways()
    for seed in seeds:
        for way in chosen:
            for name in names:
                path = folder / f"{way}; {name}; {seed}.json"
                begun = path.with_suffix(".begun")
                if path.exists() or not _begin(begun):
                    continue
                trained, seconds = train(nets, name, seed, *known[way])
                for drawn, with_lora in drawings(way, trained).items():
                    row = {"way": drawn, "subject": name, "seed": seed}
                    row |= {f"{k}_seconds": v for k, v in seconds.items()}
                    row |= measures_of(nets, with_lora, judge, name, DRIFT_SEEDS)
                    with atomic_path(folder / f"{drawn}; {name}; {seed}.json") as part:
                        part.write_text(json.dumps(row))
                    shown = {key: round(value, 2) for key, value in row.items() if isinstance(value, float)}
                    logger.info("%s, %s, seed %d: %s", drawn, name, seed, shown)
                begun.unlink(missing_ok=True)


def drawings(way: str, trained: Narrow) -> dict[str, Narrow]:
    """What is measured of a run, by name: a T-LoRA is drawn without its masks too, as other programs would."""
    if not way.endswith("T-LoRA"):
        return {way: trained}
    # The name that says that a run is finished comes last.
    return {f"{way}, drawn without masks": trained, way: replace(trained, unet=MaskedNetwork(trained.unet))}  # type: ignore[arg-type]


def _begin(path: Path) -> bool:
    try:
        os.close(os.open(path, os.O_CREAT | os.O_EXCL))
    except FileExistsError:
        return False
    return True


def main() -> None:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("ways", nargs="*", help="all by default")
    parser.add_argument("--subjects", default=",".join(NAMES))
    parser.add_argument("--seeds", type=int, default=SEEDS)
    options = parser.parse_args()
    logging.basicConfig(level=logging.INFO, format="%(message)s")
    run(options.ways or list(ways()), options.subjects.split(","), list(range(options.seeds)))


if __name__ == "__main__":
    main()
