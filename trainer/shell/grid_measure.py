"""Measures the runs of a grid: figures and pictures of a LoRA, kept as a record."""

from __future__ import annotations

import dataclasses
import time
from collections.abc import Callable, Sequence
from typing import Any

import torch
from PIL import Image

from ..experiment.figures import MEASURES, SCORES
from ..experiment.records import Records
from ..experiment.spec import DEMO_BASES, Measuring
from ..files.labelled_grid import as_pictures
from ..files.storage import canonical_json, sha256_of, user_path
from ..machine.runtime import choose_precision
from ..measure.drawer import Drawer
from ..measure.embedding import from_folder
from ..measure.evaluation import Draw, Evaluation, evaluate
from ..measure.prompts import OTHER_PROMPTS, PromptSet, prompt_set
from ..runs.lora_reader import read_lora
from ..runs.recipe import Recipe
from ..runs.run import Run
from ..subject.captions import fill_template
from ..subject.photo_files import read_photos
from ..subject.subject import Subject
from .demo_parts import DEMO, MeasureSetup, demo_setup
from .recipe import photo_paths

MOST_KEPT = 2**30
"""Bytes of the base's own pictures that are kept for the next runs."""


class Measurer:
    """Measures runs.

    Args:
        records: where the results are kept.
        measuring: what is measured.
        device: where pictures are drawn.
    """

    def __init__(self, records: Records, measuring: Measuring, device: torch.device) -> None:
        self._records, self._measuring, self._device = records, measuring, device
        self._setups: dict[str, MeasureSetup | None] = {}
        self._drawn: dict[tuple[Any, ...], torch.Tensor] = {}

    def record(self, recipe: Recipe, run: Run, base: str) -> tuple[str, float | None]:
        """Measure the result of a run, unless there is a record of it.

        Args:
            recipe: of the run.
            run: finished.
            base: as in the experiment.

        Returns:
            the record's name, and the seconds that it took; None if it existed.

        Raises:
            SubjectBoothError: the embedder or the LoRA cannot be used, or the record cannot be written.
        """
        assert run.result is not None
        began, measuring = time.monotonic(), self._measuring
        step, folder = run.result.step, run.folder
        setup = self._setup(base)
        photos = self._photos(recipe.subject)
        digest = sha256_of(canonical_json(dataclasses.asdict(measuring)), setup.embedder.name if setup else "", *photos)
        name = f"{folder.key[:16]}_{step:06d}_{digest[:8]}"
        if self._records.read(name) is not None:
            return name, None
        scores = folder.scores(step).get(step, {})
        figures = {score: scores[score] for score in SCORES if score in scores and score in measuring.figures}
        more, notes, pictures = self._draw(recipe, run, step, setup, photos)
        self._records.write(
            name,
            run=folder.path.name,
            key=folder.key,
            step=step,
            figures=figures | more,
            notes=notes,
            pictures=pictures,
        )
        return name, time.monotonic() - began

    def _draw(
        self, recipe: Recipe, run: Run, step: int, setup: MeasureSetup | None, photos: Sequence[torch.Tensor]
    ) -> tuple[dict[str, float], list[str], list[Image.Image]]:
        """Figures from pictures, notes, and the pictures to show: with the LoRA, then by the base."""
        measuring, subject = self._measuring, recipe.subject
        wanted = [figure for figure in measuring.figures if figure in MEASURES]
        others = tuple(setup.others if setup else OTHER_PROMPTS)
        # The usual prompts as a whole: those that share a word with the class are then replaced.
        prompts = prompt_set(subject.class_word, subject.trigger, others)
        prompts = dataclasses.replace(prompts, others=prompts.others[: measuring.others])
        shown = [fill_template(prompt, subject.token, subject.class_word) for prompt in measuring.prompts]
        is_measured = bool(wanted) and setup is not None
        sampling = (
            measuring.resolution or (setup.resolution if setup else None) or recipe.config.resolution,
            measuring.steps or (setup.steps if setup else 20),
            measuring.guidance_scale or (setup.guidance_scale if setup else 7.0),
        )
        precision = choose_precision(recipe.config, self._device)[0]
        path = run.folder.lora_path(step)
        every = [*(prompts.all if is_measured else ()), *shown]
        drawer = Drawer(recipe.base, read_lora(path)[0], path.name, every, *sampling, self._device, precision)
        draw = self._keeping(drawer, (recipe.base.digest, *sampling, precision))
        figures: dict[str, float] = {}
        notes: list[str] = []
        if is_measured and setup is not None:
            figures, notes = self._evaluate(draw, setup, prompts, photos)
        elif wanted:
            notes = ["Without an embedder, pictures are not measured: set embedder in [measure]."]
        seed = [measuring.picture_seed]
        drawn = [draw(prompt, seed, with_lora)[0] for with_lora in (True, False) for prompt in shown]
        pictures = as_pictures(torch.stack(drawn).movedim(1, -1)) if drawn else []
        return {figure: figures[figure] for figure in wanted if figure in figures}, notes, pictures

    def _evaluate(
        self, draw: Draw, setup: MeasureSetup, prompts: PromptSet, photos: Sequence[torch.Tensor]
    ) -> tuple[dict[str, float], list[str]]:
        for event in evaluate(draw, setup.embedder, prompts, range(self._measuring.seeds), photos):
            if isinstance(event, Evaluation):
                return {name: figure.value for name, figure in event.figures.items()}, list(event.notes)
        raise AssertionError("evaluate always ends with the evaluation")

    def _keeping(self, drawer: Drawer, about: tuple[Any, ...]) -> Callable[[str, Sequence[int], bool], torch.Tensor]:
        """Draws; the base's own pictures are kept, because they are the same for every run."""

        def draw(prompt: str, seeds: Sequence[int], with_lora: bool) -> torch.Tensor:
            if with_lora:
                return drawer(prompt, seeds, True)
            key = (*about, prompt, *seeds)
            if key in self._drawn:
                return self._drawn[key]
            pictures = drawer(prompt, seeds, False)
            if sum(kept.nbytes for kept in self._drawn.values()) + pictures.nbytes <= MOST_KEPT:
                self._drawn[key] = pictures
            return pictures

        return draw

    def _photos(self, subject: Subject) -> list[torch.Tensor]:
        """The photos to compare with, each float32 [3, h, w] in 0..1."""
        photos = subject.photos
        if self._measuring.photos:
            photos = tuple(read_photos(photo_paths(self._measuring.photos), "template")[0])
        return [torch.from_numpy(photo.pixels).permute(2, 0, 1).float() / 255 for photo in photos]

    def _setup(self, base: str) -> MeasureSetup | None:
        """The embedder, with what depends on it; None without one."""
        name = self._measuring.embedder or (DEMO if base in DEMO_BASES else "")
        if name not in self._setups:
            if name == DEMO:
                self._setups[name] = demo_setup()
            else:
                embedder = from_folder(user_path(name), self._device) if name else None
                self._setups[name] = MeasureSetup(embedder, OTHER_PROMPTS) if embedder else None
        return self._setups[name]
