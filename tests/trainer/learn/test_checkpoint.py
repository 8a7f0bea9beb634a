"""A checkpoint keeps the loss by the names of its terms; one of before, with three numbers a step, is read as such."""

from __future__ import annotations

from pathlib import Path

import torch

from subjectbooth.trainer.files.safetensors_file import read_checked, write_checked
from subjectbooth.trainer.learn.checkpoint import Checkpoint, load, save

ADAPTER = {"unet/a": torch.ones(2, 2)}


def test_losses_come_back_by_name_and_what_a_step_had_not_stays_away(tmp_path: Path) -> None:
    losses = [
        {"loss": 1.0, "instance_loss": 0.5, "prior_loss": 0.5},
        {"loss": 0.5, "instance_loss": 0.25, "prior_loss": 0.25, "another": 0.0},
        {"loss": 0.75, "instance_loss": 0.75},
    ]
    path = tmp_path / "checkpoint.safetensors"
    save(path, Checkpoint(3, ADAPTER, {}, losses, {"precision": "fp32"}))
    assert load(path).losses == losses


def test_a_checkpoint_whose_losses_have_no_names_is_read(tmp_path: Path) -> None:
    """As they were written before: the loss, that of the photos, and that of the class images if there were any."""
    path = tmp_path / "checkpoint.safetensors"
    save(path, Checkpoint(2, ADAPTER, {}, [], {"precision": "fp32"}))
    tensors, state = read_checked(path)
    assert isinstance(state, dict) and state.pop("loss_names") == []
    write_checked(path, tensors, state | {"losses": [[1.0, 0.5, None], [0.75, 0.25, 0.5]]})
    found = load(path)
    assert found.losses == [
        {"loss": 1.0, "instance_loss": 0.5},
        {"loss": 0.75, "instance_loss": 0.25, "prior_loss": 0.5},
    ]
    assert found.step == 2 and torch.equal(found.adapter["unet/a"], ADAPTER["unet/a"])
