"""Checkpoints: all state that resuming needs. Random numbers need none, see :mod:`trainer.machine.draws`."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch

from ..errors import SubjectBoothError
from ..files.safetensors_file import read_checked, write_checked

CHECKPOINT_FORMAT = 1


@dataclass
class Checkpoint:
    """The state of a run, on the CPU.

    Attributes:
        step: optimizer steps done.
        adapter: the LoRA's weights by name.
        optimizer: the optimizer's tensors and numbers by name, by parameter number.
        losses: for every step so far, the total ("loss") and its terms by name.
        chosen: the values of ``auto`` settings; a resumed run keeps them.
        groups: values of the optimizer's parameter groups, such as Prodigy's estimate.
        average: the running average by parameter number; empty without EMA.
        scaler: state of fp16 loss scaling; empty in other precisions.
    """

    step: int
    adapter: dict[str, torch.Tensor]
    optimizer: dict[int, dict[str, Any]]
    losses: list[dict[str, float]]
    chosen: dict[str, str]
    groups: list[dict[str, Any]] = field(default_factory=list)
    average: list[torch.Tensor] = field(default_factory=list)
    scaler: dict[str, Any] = field(default_factory=dict)


def save(path: Path, checkpoint: Checkpoint) -> None:
    """Write the checkpoint atomically, as one safetensors file."""
    tensors = {f"adapter/{name}": tensor for name, tensor in checkpoint.adapter.items()}
    tensors |= {f"average/{index}": tensor for index, tensor in enumerate(checkpoint.average)}
    numbers: dict[str, dict[str, Any]] = {}
    names = list(dict.fromkeys(name for row in checkpoint.losses for name in row))
    for index, entries in checkpoint.optimizer.items():
        for name, value in entries.items():
            if isinstance(value, torch.Tensor):
                tensors[f"optimizer/{index}/{name}"] = value.cpu()
            else:
                numbers.setdefault(str(index), {})[name] = value
    write_checked(
        path,
        tensors,
        {
            "format": CHECKPOINT_FORMAT,
            "step": checkpoint.step,
            "optimizer": numbers,
            "loss_names": names,
            "losses": [[row.get(name) for name in names] for row in checkpoint.losses],
            "chosen": checkpoint.chosen,
            "groups": checkpoint.groups,
            "scaler": checkpoint.scaler,
        },
    )


def load(path: Path) -> Checkpoint:
    """Read what :func:`save` wrote.

    Raises:
        FileNotFoundError: the file was not found.
        SubjectBoothError: it is damaged or has another version.
    """
    tensors, state = read_checked(path)
    if not isinstance(state, dict) or state.get("format") != CHECKPOINT_FORMAT:
        raise SubjectBoothError(
            "the checkpoint has another version",
            f"version {CHECKPOINT_FORMAT}",
            "train again with force_retrain",
            str(path),
        )
    adapter: dict[str, torch.Tensor] = {}
    optimizer: dict[int, dict[str, Any]] = {int(index): dict(entries) for index, entries in state["optimizer"].items()}
    average: dict[int, torch.Tensor] = {}
    for key, tensor in tensors.items():
        kind, name = key.split("/", 1)
        if kind == "adapter":
            adapter[name] = tensor
        elif kind == "average":
            average[int(name)] = tensor
        else:
            index, entry = name.split("/", 1)
            optimizer.setdefault(int(index), {})[entry] = tensor
    return Checkpoint(
        state["step"],
        adapter,
        optimizer,
        _named(state["losses"], state.get("loss_names", ("loss", "instance_loss", "prior_loss"))),
        state["chosen"],
        state["groups"],
        [average[index] for index in sorted(average)],
        state["scaler"],
    )


def _named(rows: list[list[float | None]], names: Sequence[str]) -> list[dict[str, float]]:
    return [{name: loss for name, loss in zip(names, row, strict=True) if loss is not None} for row in rows]
