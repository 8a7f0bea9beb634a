"""What the autoencoder of the demo base trains by: any drawing, and a distance of features beside that of pixels."""

from __future__ import annotations

import random

import numpy as np
import pytest
import torch
import torch.nn.functional as F

from subjectbooth.demo.making.compose import Composer
from subjectbooth.demo.making.perceptual import Eye
from subjectbooth.demo.making.pictures import SIDE, Library


def library(count: int = 3) -> Library:
    """Full squares in grey levels that name them, of words that are no class."""
    pixels = np.full((count, SIDE, SIDE, 4), 255, np.uint8)
    for i in range(count):
        pixels[i, :, :, :3] = 40 * i
    return Library(pixels, tuple(f"icon {i}" for i in range(count)), ("noto",) * count)


def test_any_drawing_is_composed_though_it_is_of_no_class() -> None:
    composer = Composer(library())
    assert composer.by_word == {}
    images, which = composer.any_drawings(random.Random(0), 40)
    assert images.shape == (40, 3, 64, 64)
    assert set(which) == {0, 1, 2}
    for image, i in zip(images, which, strict=True):
        assert torch.allclose(image[:, 28:36, 28:36], torch.tensor(40 * i / 255), atol=1e-4)
    again, same = composer.any_drawings(random.Random(0), 40)
    assert same == which
    assert torch.equal(again, images)


def test_the_distance_is_that_of_unit_features_at_every_place() -> None:
    torch.manual_seed(0)
    eye = Eye().eval().requires_grad_(False)
    one, other = torch.rand(2, 3, 64, 64), torch.rand(2, 3, 64, 64)
    assert eye.distance(one, one) == 0
    expected = 0.0
    for a, b in zip(eye(one), eye(other), strict=True):
        places = a.shape[0] * a.shape[2] * a.shape[3]
        expected += float((F.normalize(a, dim=1, eps=1e-3) - F.normalize(b, dim=1, eps=1e-3)).square().sum()) / places
    assert float(eye.distance(one, other)) == pytest.approx(expected, rel=1e-5)
    assert [f.shape[-1] for f in eye(one)] == [64, 32, 16, 8]


def test_its_gradient_goes_to_the_picture_and_not_to_the_target() -> None:
    eye = Eye().eval().requires_grad_(False)
    picture, target = torch.rand(1, 3, 64, 64, requires_grad=True), torch.rand(1, 3, 64, 64, requires_grad=True)
    eye.distance(picture, target).backward()
    assert picture.grad is not None and picture.grad.abs().sum() > 0
    assert target.grad is None
