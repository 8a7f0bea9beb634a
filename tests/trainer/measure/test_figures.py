"""The measures against values worked out by hand."""

from __future__ import annotations

import math

import pytest
import torch

from subjectbooth.trainer.measure import figures

X, Y, Z = torch.eye(3)
MIDWAY = (X + Y) / math.sqrt(2)  # at 45 degrees to both
COS45 = math.sqrt(0.5)


def prompts(*rows: tuple[torch.Tensor, ...]) -> torch.Tensor:
    return torch.stack([torch.stack(row) for row in rows])


def test_drift_is_0_for_the_same_pictures_and_1_for_other_ones() -> None:
    before = prompts((X, Y), (Y, Z))
    assert figures.drift(before, before).tolist() == [0, 0]
    # Each picture became one that is as far from it as the two seeds are from each other.
    assert figures.drift(before, prompts((Z, X), (X, X))).tolist() == [1, 1]


def test_drift_is_measured_in_distances_between_two_seeds_of_the_base() -> None:
    """Between the seeds: 1 for the first prompt, 1 - cos 45 for the second. Only the first seed of the first moved."""
    before, after = prompts((X, Y), (X, MIDWAY)), prompts((MIDWAY, Y), (X, MIDWAY))
    between = (1 + (1 - COS45)) / 2
    assert figures.drift(before, after).tolist() == pytest.approx([(1 - COS45) / 2 / between, 0], abs=1e-6)


def test_drift_does_not_divide_by_the_seeds_after_training() -> None:
    """Afterwards all pictures are the same one, half a turn away from what they were."""
    assert figures.drift(prompts((X, Y)), prompts((Z, Z))).tolist() == [1, 1]


def test_diversity() -> None:
    """Three seeds of one prompt: X is at distance 1 from both others, which are equal."""
    assert figures.div(prompts((X, Y, Y))).tolist() == [1, 0.5, 0.5]
    assert figures.div(prompts((X, Y, Y), (Z, Z, Z))).tolist() == [0.5, 0.25, 0.25]
    assert float(figures.seed_distance(prompts((X, Y, Y)))) == pytest.approx(2 / 3)  # of the three pairs, two differ


def test_similarity_to_the_photos() -> None:
    """The first seed's picture is one of the two photos; the second's is at 45 degrees to both."""
    photos = torch.stack([X, Y])
    pictures = prompts((X, MIDWAY), (X, MIDWAY))
    assert figures.similarity(pictures, photos).tolist() == pytest.approx([0.5, COS45])
    assert torch.equal(figures.pres(pictures, photos), figures.similarity(pictures, photos))


def test_a_picture_is_the_subject_if_it_is_nearer_to_the_photos_than_to_the_class() -> None:
    photos, plain = torch.stack([X, X]), prompts((Y, Z), (Y, Z))
    assert figures.subject_share(prompts((X, Y), (MIDWAY, Z)), photos, plain).tolist() == [1, 0]
    assert figures.subject_share(prompts((X, Y), (Y, X)), photos, plain).tolist() == [0.5, 0.5]


def test_share() -> None:
    assert figures.share([[True, False], [True, True], [True, False], [True, False]]).tolist() == [1, 0.25]
