"""What a step does with its gradient: learning rates, accumulation and clipping, against values computed by hand."""

from __future__ import annotations

import dataclasses
import math
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from subjectbooth.tests.small_base import small_base, small_class_images, small_subject
from subjectbooth.trainer.config import TrainConfig
from subjectbooth.trainer.events import StepDone
from subjectbooth.trainer.runs.run import Run

CPU = torch.device("cpu")
CONFIG = TrainConfig(steps=4, learning_rate=1e-3, rank=4, network_alpha=4.0, resolution=64, max_grad_norm=0.0)


class Steps(list[tuple[list[float], torch.Tensor]]):
    """What every optimizer step was given: the groups' learning rates, and all gradients as one vector."""


@pytest.fixture
def steps(monkeypatch: pytest.MonkeyPatch) -> Steps:
    """Filled by the runs of the test."""
    seen, step = Steps(), torch.optim.AdamW.step

    def recording(self: torch.optim.AdamW, *args: Any, **kwargs: Any) -> Any:
        gradients = [
            parameter.grad.flatten()
            for group in self.param_groups
            for parameter in group["params"]
            if parameter.grad is not None
        ]
        seen.append(([float(group["lr"]) for group in self.param_groups], torch.cat(gradients).clone()))
        return step(self, *args, **kwargs)

    monkeypatch.setattr(torch.optim.AdamW, "step", recording)
    return seen


def _run(root: Path, **changes: Any) -> list[StepDone]:
    run = Run(small_base(), small_subject(), small_class_images(), dataclasses.replace(CONFIG, **changes), root, CPU)
    return [event for event in run.events() if isinstance(event, StepDone)]


# Of 4 steps, as shares of the full rate. The warm-up rises in equal parts and is full at its last step's end.
SCHEDULES = {
    ("constant", 0): [1, 1, 1, 1],
    ("linear", 0): [1, 3 / 4, 2 / 4, 1 / 4],
    ("cosine", 0): [1, (1 + math.sqrt(0.5)) / 2, 1 / 2, (1 - math.sqrt(0.5)) / 2],
    ("constant", 1): [1 / 2, 1, 1, 1],
    ("linear", 2): [1 / 3, 2 / 3, 1, 1 / 2],
    ("cosine", 2): [1 / 3, 2 / 3, 1, 1 / 2],
}


@pytest.mark.parametrize(("schedule", "warmup"), list(SCHEDULES))
def test_the_optimizer_gets_the_schedules_rate_for_every_group(
    tmp_path: Path, steps: Steps, schedule: str, warmup: int
) -> None:
    told = _run(tmp_path, lr_scheduler=schedule, lr_warmup_steps=warmup, train_text_encoder=True, text_encoder_lr=2e-4)
    shares = SCHEDULES[schedule, warmup]
    assert [event.learning_rate for event in told] == pytest.approx([1e-3 * share for share in shares])
    assert [rates[0] for rates, _ in steps] == pytest.approx([1e-3 * share for share in shares])
    assert [rates[1] for rates, _ in steps] == pytest.approx([2e-4 * share for share in shares])


def test_accumulated_gradients_are_the_mean_of_their_batches(tmp_path: Path, steps: Steps) -> None:
    # At this rate the weights stay where they are, so that both runs see the same model.
    alone = _run(tmp_path, learning_rate=1e-9, steps=4)
    single = [gradient for _, gradient in steps]
    steps.clear()
    summed = _run(tmp_path, learning_rate=1e-9, steps=2, gradient_accumulation_steps=2)
    assert len(steps) == 2
    for number, (_, gradient) in enumerate(steps):
        first, second = single[2 * number], single[2 * number + 1]
        torch.testing.assert_close(gradient, (first + second) / 2, rtol=1e-3, atol=1e-6)
        assert float((first - second).abs().max()) > 1e-3  # of different batches
        assert summed[number].loss == pytest.approx((alone[2 * number].loss + alone[2 * number + 1].loss) / 2, rel=1e-4)


def test_a_gradient_is_cut_to_the_largest_norm_and_0_leaves_it(tmp_path: Path, steps: Steps) -> None:
    told = _run(tmp_path, steps=1)
    (_, whole), norm = steps.pop(), told[0].grad_norm
    assert float(whole.norm()) == pytest.approx(norm, rel=1e-4)
    cut = _run(tmp_path, steps=1, max_grad_norm=norm / 4)
    assert cut[0].grad_norm == pytest.approx(norm, rel=1e-4)  # told is what it was before
    torch.testing.assert_close(steps.pop()[1], whole / 4, rtol=1e-3, atol=1e-7)
    _run(tmp_path, steps=1, max_grad_norm=norm * 4)
    torch.testing.assert_close(steps.pop()[1], whole, rtol=1e-4, atol=1e-7)


def test_the_class_images_count_by_their_weight(tmp_path: Path) -> None:
    for weight in (0.3, 2.0):
        event = _run(tmp_path, steps=1, prior_loss_weight=weight)[0]
        assert event.losses["prior_loss"] > 0.01
        assert event.loss == pytest.approx(
            event.losses["instance_loss"] + weight * event.losses["prior_loss"], rel=1e-5
        )


def test_the_halves_of_a_photo_masked_one_by_one_are_its_whole_loss(tmp_path: Path) -> None:
    """Each half is averaged over itself, so the two losses' mean is that of the unmasked photo."""
    left = np.zeros((80, 80), np.float32)
    left[:, :40] = 1.0

    def loss(name: str, mask: np.ndarray, masked: bool = True) -> float:
        photos = tuple(dataclasses.replace(photo, mask=mask) for photo in small_subject().photos)
        config = dataclasses.replace(CONFIG, steps=1, masked_loss=masked)
        run = Run(small_base(), dataclasses.replace(small_subject(), photos=photos), None, config, tmp_path / name, CPU)
        return next(event.loss for event in run.events() if isinstance(event, StepDone))

    one, other, whole = loss("left", left), loss("right", 1 - left), loss("whole", left, masked=False)
    assert (one + other) / 2 == pytest.approx(whole, rel=1e-2)
    assert abs(one - other) > 0.1 * whole
