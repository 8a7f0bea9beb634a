"""What the nets are shown besides the sets' own drawings: grey stays grey, colours are valid, a bend is small."""

from __future__ import annotations

import random

import pytest
import torch

from subjectbooth.demo.making.recolour import BEND, colour_matrix, light, recoloured, varied, warped

SIDE = 16


def drawings(count: int) -> torch.Tensor:
    generator = torch.Generator().manual_seed(0)
    alpha = torch.rand(count, 1, SIDE, SIDE, generator=generator)
    return torch.cat([torch.rand(count, 3, SIDE, SIDE, generator=generator) * alpha, alpha], 1)


def test_a_hue_turn_keeps_grey_and_the_mean_of_the_channels() -> None:
    rng = random.Random(0)
    for _ in range(20):
        matrix = colour_matrix(rng)
        assert torch.allclose(matrix @ torch.full((3,), 0.4), torch.full((3,), 0.4), atol=1e-6)
        colour = torch.tensor([0.9, 0.1, 0.3])
        assert float((matrix @ colour).mean()) == pytest.approx(float(colour.mean()), abs=1e-6)


def test_a_third_of_a_turn_moves_red_to_green() -> None:
    class Third(random.Random):
        def uniform(self, a: float, b: float) -> float:
            return 2 * torch.pi / 3 if a < 0 else 1.0

    turned = colour_matrix(Third()) @ torch.tensor([1.0, 0.0, 0.0])
    assert torch.allclose(turned, torch.tensor([0.0, 1.0, 0.0]), atol=1e-6)


def test_light_is_smooth_and_bounded() -> None:
    rng = random.Random(0)
    for _ in range(20):
        factor = light(rng, 64)
        assert 0.45 <= float(factor.min()) and float(factor.max()) <= 1.3501
        assert float(factor.diff(dim=0).abs().max()) < 0.1


def test_recoloured_drawings_stay_premultiplied_and_keep_their_shape() -> None:
    given = drawings(64)
    changed = recoloured(given, random.Random(1))
    assert torch.equal(changed[:, 3], given[:, 3])
    assert float(changed.min()) >= 0
    assert bool((changed[:, :3] <= changed[:, 3:] + 1e-6).all())
    different = (changed != given).flatten(1).any(1).float().mean()
    assert 0.85 < float(different) < 1  # 1 in 2 x 2 in 3 x 1 in 3 stay as they are
    assert torch.equal(changed, recoloured(given, random.Random(1)))


def test_black_can_become_a_colour() -> None:
    black = torch.cat([torch.zeros(64, 3, SIDE, SIDE), torch.ones(64, 1, SIDE, SIDE)], 1)
    changed = recoloured(black, random.Random(2))[:, :3].amax((1, 2, 3))
    assert 0.15 < float((changed > 0.1).float().mean()) < 0.5


def test_a_bend_is_small_and_smooth_and_differs_from_drawing_to_drawing() -> None:
    side = 64
    along = (torch.arange(side) + 0.5) / side
    ramps = torch.stack([along.expand(side, side), along.view(-1, 1).expand(side, side)])
    given = torch.cat([ramps, torch.ones(2, side, side)]).expand(8, 4, side, side)
    moved = (warped(given, random.Random(0)) - given)[:, :2, 8:-8, 8:-8]  # the border takes in zeros from outside
    assert 0.25 * BEND < float(2 * moved.abs().max()) < 1.34 * BEND
    assert float(moved.diff(dim=-1).abs().max()) < 0.02, "neighbours move alike"
    assert float((moved[0] - moved[1]).abs().max()) > 0.01


def test_varied_leaves_half_of_the_drawings_as_they_are_and_keeps_the_rest_valid() -> None:
    given = drawings(200)
    changed = varied(given, random.Random(1))
    different = (changed != given).flatten(1).any(1).float().mean()
    assert 0.4 < float(different) < 0.6
    assert float(changed.min()) >= 0
    assert bool((changed[:, :3] <= changed[:, 3:] + 1e-6).all())
    assert torch.equal(changed, varied(given, random.Random(1)))
