"""Runs that are trained four times too long, on the narrow model, to validate how a run chooses its best step.

``python -m demo.making.best_step train`` trains and judges them (four minutes each on one core). Each run is a file
in demo/.work/best_step with its adapter and the judge's figures at every kept step, so that scores and rules can be
computed again without training. An interrupted run is trained again; finished ones are kept. ``... rules`` scores them
as a run does (:mod:`trainer.learn.probe`), compares rules, and prints the tables of docs/best-step.md.
"""

from __future__ import annotations

import argparse
import json
import logging
import time
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from .best_step_rules import ScoredRun, tables
from .build import WORK
from .classes import place
from .gain import CFG, PICTURES, SAMPLE_STEPS, Scale, photos, scale_of
from .judge import LoadedJudge, Verdict
from .measure import Figures, draw
from .measure_dreambooth import (
    OPTIONS,
    SCENES_OF_PICTURES,
    STEPS,
    figures_of,
)
from .narrow import Narrow, load_narrow
from .narrow_dreambooth import class_images_of, prompts_of, training_of
from .subjects import SUBJECTS
from .t_lora import MaskedNetwork

if TYPE_CHECKING:
    from trainer.preserve.preservation import Preservation

logger = logging.getLogger("subjectbooth")

TOO_LONG = 4 * STEPS
KEPT_EVERY = STEPS // 5
JUDGED = tuple(KEPT_EVERY * part for part in (1, 2, 3, 5, 7, 10, 14, 20))
"""The steps that the oracle judges: more of them where the best one is expected."""
FOLDER = WORK / "best_step"
RUNS = ("curvature", "class_images", "none")
"""How the class is kept."""
T_LORA = "none, T-LoRA"
"""Another run, if asked for; see :mod:`demo.making.t_lora`."""


def run_file(name: str, run: str) -> Path:
    """The file of one subject's run."""
    return FOLDER / f"{name}, {run}.pt"


def _training(nets: Narrow, name: str, run: str, seed: int = 0) -> Any:
    """The training of one run, with everything that its scores need."""
    from trainer.learn.data import Photos, ProbePrompts
    from trainer.preserve.class_images import ClassImages
    from trainer.preserve.curvature import Curvature
    from trainer.preserve.none import NoPreservation
    from trainer.runs.preparation import HELD_OUT_CROPS, SCENES, held_out_crop

    plain, special = prompts_of(name)
    crops = [held_out_crop(picture) for picture in photos(name, "train")[:HELD_OUT_CROPS]]
    with torch.no_grad():
        held_out = Photos(torch.cat([nets.encoder(crop) for crop in crops]), (special,) * len(crops))
    probe = ProbePrompts(
        special, plain, tuple(f"{special} {scene}" for scene in SCENES), tuple(f"{plain} {scene}" for scene in SCENES)
    )
    if run == "class_images":
        way: Preservation = ClassImages(class_images_of(nets, name, seed))
    else:
        way = Curvature(SUBJECTS[name].class_word) if run == "curvature" else NoPreservation()
    data = {"probe": probe, "held_out": held_out}
    return training_of(nets, name, seed, way, data, run == T_LORA, steps=TOO_LONG, validation_interval=KEPT_EVERY)


def adapters(nets: Narrow, name: str, run: str) -> Iterator[tuple[int, dict[str, torch.Tensor], Any]]:
    """Train one run; yields every KEPT_EVERY steps the step, the adapter's weights and the network with them."""
    from trainer.events import StepDone
    from trainer.learn.adapter import adapter_state

    with _training(nets, name, run) as training:
        for event in training.events():
            if isinstance(event, StepDone) and event.step % KEPT_EVERY == 0:
                network = training.averaged_network()
                yield event.step, adapter_state(network), network


def scores_of(nets: Narrow, name: str, run: str) -> dict[int, dict[str, float]]:
    """The scores of a run's kept steps, and of the base as step 0.

    In addition to the run's own: "held_out_photo_loss", on photos of the subject that it was not trained on.
    """
    from dataclasses import replace

    from trainer.learn.adapter import load_adapter_state
    from trainer.learn.assembly import NETWORK
    from trainer.learn.data import Photos
    from trainer.learn.probe import HELD_OUT_LOSS, Probe

    kept = torch.load(run_file(name, run), weights_only=True)["steps"]
    with _training(nets, name, T_LORA if run == T_LORA else "none") as training:
        training.plan()  # builds the network
        data, state, denoiser = training._data, training._assembly, training._base.denoiser
        unseen = training._base.codec.encode(photos(name, "heldout"))
        probe = Probe(denoiser, data, state, OPTIONS["snr_gamma"])
        photo_probe = Probe(
            denoiser, replace(data, held_out=Photos(unseen, data.captions)), state, OPTIONS["snr_gamma"]
        )
        found = {}
        for step, weights in {0: None, **{step: row["adapter"] for step, row in kept.items()}}.items():
            if weights is not None:
                load_adapter_state(state.modules[NETWORK], weights)
            found[step] = probe.scores(with_adapter=step > 0)
            found[step]["held_out_photo_loss"] = photo_probe.scores(with_adapter=step > 0)[HELD_OUT_LOSS]
        return found


class Oracle:
    """Judges an adapter of one subject with pictures from fixed seeds.

    Args:
        nets: the base.
        judge: the judge.
        name: the subject.
    """

    def __init__(self, nets: Narrow, judge: LoadedJudge, name: str) -> None:
        self._judge, self._word = judge, SUBJECTS[name].class_word
        self._plain, self._special = prompts_of(name)
        pictures = self._draw(nets, [self._plain] * PICTURES, 100)
        self._scale: Scale = scale_of(judge, name, pictures)
        self._before: Verdict = judge.classify(pictures)
        cosines = self._before.embedding @ self._before.embedding.T
        self._between_seeds = float(1 - (cosines.sum() - PICTURES) / (PICTURES * (PICTURES - 1)))

    def _draw(self, nets: Narrow, prompts: list[str], first: int) -> torch.Tensor:
        return draw(nets, prompts, list(range(first, first + len(prompts))), SAMPLE_STEPS, CFG)

    def figures(self, nets: Narrow) -> dict[str, float]:
        """The figures of :func:`figures_of`, and the drift of the class prompt: the mean of 1 - cosine between pictures
        from the same seed before and after, divided by its mean between two seeds of the base."""
        scenes = [f"{self._special} {place(scene)}" for scene in SCENES_OF_PICTURES]
        after = self._judge.classify(self._draw(nets, [self._plain] * PICTURES, 100))
        figures = figures_of(
            self._scale,
            self._draw(nets, [self._special] * PICTURES, 200),
            self._draw(nets, scenes, 300),
            after,
            self._word,
        )
        moved = float((1 - (after.embedding * self._before.embedding).sum(1)).mean())
        subject_at = self._judge.names.index((self._word, "fluent"))
        # A share of 16 pictures is in steps of 0.06; the judge's probability is finer.
        probability = float(after.drawing_probability[:, subject_at].mean())
        return {**figures, "class_drift": moved / self._between_seeds, "class_prompt_subject_probability": probability}


def train_and_judge(nets: Narrow, judge: LoadedJudge, name: str, run: str) -> Figures:
    """Train one run and judge all its kept steps."""
    from dataclasses import replace

    began, oracle = time.monotonic(), Oracle(nets, judge, name)
    kept: dict[int, Any] = {}
    for step, weights, network in adapters(nets, name, run):
        kept[step] = {"adapter": weights}
        if step in JUDGED:
            if run == T_LORA:
                kept[step]["figures_without_masks"] = oracle.figures(replace(nets, unet=network))
                network = MaskedNetwork(network)
            kept[step]["figures"] = oracle.figures(replace(nets, unet=network))
        if step in (STEPS, TOO_LONG):
            shown = {what: round(value, 2) for what, value in kept[step]["figures"].items()}
            logger.info("%s, %s, step %d: %s (%.0f s)", name, run, step, shown, time.monotonic() - began)
    return {"subject": name, "run": run, "steps": kept}


def train_all(names: list[str], runs: list[str]) -> None:
    """Train what is missing."""
    from .files import save

    FOLDER.mkdir(parents=True, exist_ok=True)
    nets, judge = load_narrow(), LoadedJudge()
    for run in runs:
        for name in names:
            if not run_file(name, run).exists():
                save(run_file(name, run), train_and_judge(nets, judge, name, run))


def scored_runs(nets: Narrow, names: list[str], runs: list[str]) -> list[ScoredRun]:
    """Scores and figures of the finished runs; scores are saved, because they take a few seconds each."""
    path = FOLDER / "scores.json"
    saved = json.loads(path.read_text(encoding="utf-8")) if path.exists() else {}
    found = []
    for run in runs:
        for name in names:
            if not run_file(name, run).exists():
                continue
            key = run_file(name, run).stem
            if key not in saved:
                steps = torch.load(run_file(name, run), weights_only=True)["steps"]
                figures = {step: row["figures"] for step, row in steps.items() if "figures" in row}
                saved[key] = {"scores": scores_of(nets, name, run), "figures": figures}
                path.write_text(json.dumps(saved), encoding="utf-8")
            by_step = [{int(step): row for step, row in saved[key][part].items()} for part in ("scores", "figures")]
            found.append(ScoredRun(name, run, *by_step))
    return found


def main() -> None:
    """Train, or compare the rules."""
    parser = argparse.ArgumentParser(prog="python -m demo.making.best_step", description=__doc__)
    parser.add_argument("part", choices=("train", "rules"))
    parser.add_argument("--subjects", default=",".join(SUBJECTS))
    parser.add_argument("--runs", default=",".join(RUNS))
    arguments = parser.parse_args()
    logging.basicConfig(level=logging.INFO, format="%(asctime)s %(message)s")
    torch.set_num_threads(1)
    names, runs = arguments.subjects.split(","), arguments.runs.split(",")
    if arguments.part == "train":
        train_all(names, runs)
    else:
        print(tables(scored_runs(load_narrow(), names, runs)))


if __name__ == "__main__":
    main()
