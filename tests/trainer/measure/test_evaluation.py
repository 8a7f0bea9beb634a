"""The evaluation: what is drawn, what is computed from it, and its report. Pictures are plain colours."""

from __future__ import annotations

import csv
import io
import json
from collections.abc import Sequence

import numpy as np
import pytest
import torch

from subjectbooth.trainer.errors import SubjectBoothError
from subjectbooth.trainer.measure.evaluation import Evaluation, Progress, evaluate
from subjectbooth.trainer.measure.prompts import PromptSet
from subjectbooth.trainer.measure.report import as_csv, as_json, grid, markdown

RED, GREEN, BLUE = torch.eye(3)
PROMPTS = PromptSet(("a dog", "a dog at night"), ("a cat", "a cow", "a hen"), ("ohwx dog",), ("ohwx dog at night",))
SEEDS = (5, 9)


class MeanColour:
    """Embeds a picture as its colour."""

    name = "mean colour"

    def embed(self, images: torch.Tensor) -> torch.Tensor:
        return torch.nn.functional.normalize(images.mean((2, 3)), dim=1)


class ColourNames(MeanColour):
    """A red picture is a dog, in any scene."""

    def names(self, images: torch.Tensor, choices: Sequence[str]) -> list[str]:
        return [choices[0] if colour[0] > 0.5 else "" for colour in self.embed(images)]


class Painter:
    """Before: the first seed red, the second green. With the LoRA: cats turn blue, the subject is red, and one of the
    plain dogs is too."""

    def __init__(self) -> None:
        self.drawn: list[tuple[str, tuple[int, ...], bool]] = []

    def __call__(self, prompt: str, seeds: Sequence[int], with_lora: bool) -> torch.Tensor:
        self.drawn.append((prompt, tuple(seeds), with_lora))
        colours = [RED, GREEN]
        if with_lora and prompt == "a cat":
            colours = [BLUE, BLUE]
        if with_lora and "dog" in prompt and prompt != "a dog at night":
            colours = [RED, RED]
        return torch.stack([colour.view(3, 1, 1).expand(3, 16, 32) for colour in colours])


def result_of(embedder: MeanColour, photos: Sequence[torch.Tensor] = ()) -> tuple[Evaluation, list[Progress]]:
    *progress, result = evaluate(Painter(), embedder, PROMPTS, SEEDS, photos)
    assert isinstance(result, Evaluation)
    return result, progress  # type: ignore[return-value]


def photo(colour: torch.Tensor) -> torch.Tensor:
    return colour.view(3, 1, 1).expand(3, 8, 8)


def test_the_figures() -> None:
    result, progress = result_of(ColourNames(), [photo(RED), photo(BLUE)])
    per_seed = {name: list(figure.per_seed) for name, figure in result.figures.items()}
    assert per_seed == {
        "drift_class": [0, 0.5],  # of the two dogs, the second seed of the plain one moved by one distance of seeds
        "drift_others": pytest.approx([1 / 3, 1 / 3]),
        "subject": [0.5, 0.5],  # one of the two photos has the subject's colour
        "subject_in_scenes": [0.5, 0.5],
        "pres_before": [0.5, 0],
        "pres": [0.5, 0.5],
        "class_is_subject": [0, 0],  # red is as near to red and blue as to red and green
        "div": [0, 0],
        "class_before": [1, 0],
        "class_after": [1, 1],
        "scenes_right": [1, 1],
    }
    assert progress[0] == Progress(2, 28) and progress[-1] == Progress(28, 28) and len(progress) == 14
    assert not result.notes


def test_equal_pictures_have_no_drift_at_all() -> None:
    """1 - cosine of a unit vector with itself is not 0 but a rounding error, as large as a real drift may be."""
    shades = torch.rand(2, 3, 1, 1, generator=torch.Generator().manual_seed(0)).expand(2, 3, 4, 4)
    *_, result = evaluate(lambda *_: shades, MeanColour(), PROMPTS, SEEDS)
    assert isinstance(result, Evaluation)
    assert [result.figures[name].per_seed for name in ("drift_class", "drift_others")] == [(0, 0), (0, 0)]


def test_a_base_that_draws_one_picture_is_reported() -> None:
    with pytest.raises(SubjectBoothError, match="the same picture of the class from every seed"):
        list(evaluate(lambda *_: torch.ones(2, 3, 4, 4), MeanColour(), PROMPTS, SEEDS))


def test_without_an_embedder_only_the_pictures_are_drawn() -> None:
    *_, result = evaluate(Painter(), None, PROMPTS, SEEDS, [photo(RED)])
    assert isinstance(result, Evaluation)
    assert not result.figures and [row.prompt for row in result.rows] == list(PROMPTS.all)
    assert result.rows[2].after[0].float().mean((1, 2)).tolist() == [0, 0, 255]  # the cat


def test_everything_is_drawn_without_the_lora_first() -> None:
    """Switching the LoRA on and off may take seconds."""
    painter = Painter()
    for _ in evaluate(painter, MeanColour(), PROMPTS, SEEDS):
        pass
    assert painter.drawn == [(prompt, SEEDS, lora) for lora in (False, True) for prompt in PROMPTS.all]


def test_closing_cancels() -> None:
    painter = Painter()
    events = evaluate(painter, MeanColour(), PROMPTS, SEEDS)
    next(events)
    events.close()  # type: ignore[attr-defined]
    assert len(painter.drawn) == 1


def test_figures_that_cannot_be_computed_are_left_out_with_a_note() -> None:
    result, _ = result_of(MeanColour())
    assert list(result.figures) == ["drift_class", "drift_others", "div"]
    assert len(result.notes) == 2
    assert all(note in markdown(result) and note in json.loads(as_json(result))["notes"] for note in result.notes)


@pytest.mark.parametrize("seeds", [(), (3,), (3, 3)])
def test_two_seeds_are_needed(seeds: tuple[int, ...]) -> None:
    painter = Painter()
    with pytest.raises(SubjectBoothError, match="2 or more"):
        evaluate(painter, MeanColour(), PROMPTS, seeds)
    assert not painter.drawn


def test_the_table() -> None:
    """drift_class: 0 and 0.5, so 0.25 with a standard error of 0.354 / sqrt 2."""
    result, _ = result_of(ColourNames(), [photo(RED)])
    assert "| drift_class | 0.250 | 0.250 | change of the class" in markdown(result)
    rows = list(csv.DictReader(io.StringIO(as_csv(result))))
    assert rows[0] == {"figure": "drift_class", "value": "0.25", "error": "0.25", "seed 5": "0.0", "seed 9": "0.5"}
    stored = json.loads(as_json(result))
    assert stored["figures"]["drift_class"] == {"value": 0.25, "error": 0.25, "per_seed": [0, 0.5]}
    assert stored["prompts"]["others"] == ["a cat", "a cow", "a hen"] and stored["embedder"] == "mean colour"


def test_the_grid_shows_each_prompt_before_and_after() -> None:
    """Pictures are twice as wide as high. Of the row of 'a cat', the second half of each pair is blue."""
    result, _ = result_of(MeanColour())
    sheet = np.asarray(grid(result, side=64))
    rows = [y for y in range(1, len(sheet)) if is_picture(sheet[y]) and not is_picture(sheet[y - 1])]
    assert len(rows) == len(PROMPTS.all)
    cat = sheet[rows[2] + 16]
    starts = [x for x in range(1, len(cat)) if (cat[x] != cat[x - 1]).any() and (cat[x] != 255).any()]
    assert [cat[x].tolist() for x in starts] == [[255, 0, 0], [0, 0, 255], [0, 255, 0], [0, 0, 255]]
    assert sum((column == [255, 0, 0]).all() for column in cat) == 64
    labels = sheet[rows[1] + 32 : rows[2]]
    assert (labels < 100).all(2).sum() > 50, "the prompt is written above its row"


def is_picture(line: np.ndarray) -> bool:
    """Whether a line of the sheet has a stretch of plain colour, as no letter has."""
    return bool(((line == 0) | (line == 255)).all() and ((line == [255, 0, 0]).all(1).sum() >= 32))


def test_large_pictures_are_scaled_down_for_the_grid() -> None:
    def draw(prompt: str, seeds: Sequence[int], with_lora: bool) -> torch.Tensor:
        return torch.zeros(len(seeds), 3, 264, 528)

    *_, result = evaluate(draw, MeanColour(), PROMPTS, SEEDS)
    assert isinstance(result, Evaluation)
    assert {row.before.shape for row in result.rows} == {(2, 3, 128, 256)}
