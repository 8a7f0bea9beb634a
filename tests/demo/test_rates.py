"""The learning rate's course of the demo base's trainings."""

from __future__ import annotations

import pytest

from subjectbooth.demo.making.rates import warm_cosine


@pytest.mark.parametrize(
    ("step", "progress", "share"),
    [(0, 0.0, 0.01), (49, 0.0, 0.5), (500, 0.0, 1.0), (500, 0.5, 0.51), (500, 1.0, 0.02)],
)
def test_it_warms_up_and_falls_along_half_a_cosine(step: int, progress: float, share: float) -> None:
    assert warm_cosine(step, progress, warmup=100, floor=0.02) == pytest.approx(share)
