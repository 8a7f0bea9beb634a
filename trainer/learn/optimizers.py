"""The optimizers, with AdamW as the fallback if a package is missing."""

from __future__ import annotations

import importlib.util
import math
from collections.abc import Sequence
from dataclasses import replace
from typing import TYPE_CHECKING, Any

import torch

from ..config import TrainConfig

if TYPE_CHECKING:
    from torch import nn


PRODIGY_RATE = 0.1
"""Learning rates from this value up are on Prodigy's scale, where 1 is usual."""

FUSED_ON = ("cpu", "cuda")
"""Devices for which torch's AdamW is one kernel."""


def make_optimizer(
    unet: list[nn.Parameter],
    text_encoders: list[nn.Parameter],
    config: TrainConfig,
    device: torch.device,
    factors: Sequence[float] = (),
) -> tuple[torch.optim.Optimizer, tuple[str, ...]]:
    """The requested optimizer, or AdamW with a note that says why.

    The text encoders have their own group and learning rate; ``initial_lr`` is a group's full rate.

    AdamW: arXiv 1711.05101; 8-bit: arXiv 2110.02861; Adafactor (without its own schedule): arXiv 1804.04235;
    Prodigy: arXiv 2306.06101.

    Args:
        factors: of the learning rate, one for each of the network's parameters; empty for one rate for all.
    """
    shared = (
        [(unet, 1.0)] if not factors else [([weight], factor) for weight, factor in zip(unet, factors, strict=True)]
    )
    rates = [(parameters, factor * config.learning_rate) for parameters, factor in shared]
    groups = [{"params": parameters, "initial_lr": rate, "lr": rate} for parameters, rate in rates]
    if text_encoders:
        # Prodigy estimates one rate for all groups, and rejects groups with different rates.
        rate = config.learning_rate if config.optimizer == "prodigy" else config.text_encoder_lr
        groups.append({"params": text_encoders, "initial_lr": rate, "lr": rate})
    return _make(groups, config, device)


def _make(
    parameters: list[dict[str, Any]],
    config: TrainConfig,
    device: torch.device,
) -> tuple[torch.optim.Optimizer, tuple[str, ...]]:
    name, learning_rate, decay = config.optimizer, config.learning_rate, config.weight_decay
    name, missing = usable_optimizer(name, device)
    if name == "adamw8bit":
        import bitsandbytes

        return bitsandbytes.optim.AdamW8bit(parameters, lr=learning_rate, weight_decay=decay), ()
    if name == "adafactor":
        from transformers.optimization import Adafactor

        return Adafactor(
            parameters,
            lr=learning_rate,
            weight_decay=decay,
            scale_parameter=False,
            relative_step=False,
            warmup_init=False,
        ), ()
    if name == "prodigy":
        import prodigyopt

        notes: tuple[str, ...] = (
            ()
            if learning_rate >= PRODIGY_RATE
            else (f"prodigy scales its estimate by the learning rate: {learning_rate:g} hardly trains, 1 is usual",)
        )
        if len(parameters) > 1:
            notes += ("prodigy also estimates the text encoder's learning rate: text_encoder_lr is not used",)
        return prodigyopt.Prodigy(
            parameters, lr=learning_rate, weight_decay=decay, safeguard_warmup=True, use_bias_correction=True
        ), notes
    return _adamw(parameters, learning_rate, decay, device), (missing,) if missing else ()


def _adamw(
    parameters: list[dict[str, Any]],
    learning_rate: float,
    weight_decay: float,
    device: torch.device,
) -> torch.optim.AdamW:
    """Fused: an adapter is hundreds of small tensors, and the default makes a dozen calls for each, or for them all."""
    fused = True if device.type in FUSED_ON else None
    return torch.optim.AdamW(parameters, lr=learning_rate, weight_decay=weight_decay, fused=fused)


def with_usable_optimizer(config: TrainConfig, device: torch.device | None) -> tuple[TrainConfig, str]:
    """The settings as they can be used here, and a note if they differ from the requested ones.

    They are what enters the run's key, so installing a missing package gives another run.
    """
    if device is None:
        device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    optimizer, missing = usable_optimizer(config.optimizer, device)
    if config.optimizer == "prodigy" and missing and config.learning_rate >= PRODIGY_RATE:
        usual = TrainConfig.learning_rate  # with AdamW, Prodigy's usual 1 would ruin the LoRA
        return replace(config, optimizer=optimizer, learning_rate=usual), f"{missing} at a learning rate of {usual:g}"
    return replace(config, optimizer=optimizer), missing


def usable_optimizer(name: str, device: torch.device) -> tuple[str, str]:
    """The optimizer to use where ``name`` is requested, and a note if it is another one."""
    missing = _missing(name, device)
    return ("adamw", missing) if missing else (name, "")


def _missing(name: str, device: torch.device) -> str:
    if name == "adamw8bit":
        if device.type != "cuda":
            return "adamw8bit needs an NVIDIA GPU; this run uses adamw"
        if importlib.util.find_spec("bitsandbytes") is None:
            return "adamw8bit needs the package bitsandbytes, which is not installed; this run uses adamw"
    if name == "prodigy" and importlib.util.find_spec("prodigyopt") is None:
        return "prodigy needs the package prodigyopt, which is not installed; this run uses adamw"
    return ""


def flat_state(entries: dict[str, Any]) -> dict[str, Any]:
    """Flatten the nested dict of bitsandbytes' quantised state, which it also loads in this form."""
    flat: dict[str, Any] = {}
    for name, value in entries.items():
        flat |= value if isinstance(value, dict) else {name: value}
    return flat


def group_values(optimizer: torch.optim.Optimizer) -> list[dict[str, Any]]:
    """The non-tensor values of the parameter groups, for JSON; without ``fused`` and ``foreach``, which depend on the
    machine.

    JSON has no infinity, the value of Prodigy's ``growth_rate``; a new optimizer sets it again.
    """
    kinds = (int, float, str, list, tuple, type(None))
    left_out = ("params", "fused", "foreach")
    return [
        {
            name: value
            for name, value in group.items()
            if name not in left_out
            and isinstance(value, kinds)
            and not (isinstance(value, float) and math.isinf(value))
        }
        for group in optimizer.state_dict()["param_groups"]
    ]
