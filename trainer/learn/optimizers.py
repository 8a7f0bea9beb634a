"""The optimizers, and what is used in place of one whose package is missing."""

from __future__ import annotations

import importlib.util
from collections.abc import Sequence
from dataclasses import replace
from typing import TYPE_CHECKING, Any

import torch

from ..config import TrainConfig

if TYPE_CHECKING:
    from torch import nn


PRODIGY_RATE = 0.1
"""A learning rate from here on is on Prodigy's scale, on which 1 is usual."""


def make_optimizer(
    unet: list[nn.Parameter],
    text_encoders: list[nn.Parameter],
    config: TrainConfig,
    device: torch.device,
    factors: Sequence[float] = (),
) -> tuple[torch.optim.Optimizer, tuple[str, ...]]:
    """The optimizer that was asked for, or AdamW and a sentence that says why.

    The text encoders have a group and a rate of their own; each group's full rate is its ``initial_lr``.

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
        # Prodigy finds one rate for everything and refuses groups of different ones.
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
            else (
                f"prodigy multiplies its estimate by the learning rate: {learning_rate:g} all but stops it, 1 is usual",
            )
        )
        if len(parameters) > 1:
            notes += ("prodigy finds the text encoder's learning rate too: text_encoder_lr is not used",)
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
    """On a CPU in one kernel a tensor: an adapter is hundreds of small tensors, and the plain way
    makes a dozen calls for each."""
    fused = True if device.type == "cpu" else None
    return torch.optim.AdamW(parameters, lr=learning_rate, weight_decay=weight_decay, fused=fused)


def with_usable_optimizer(config: TrainConfig, device: torch.device | None) -> tuple[TrainConfig, str]:
    """The settings that such a run really has here, and a sentence when they are not those that were asked for.

    They are what the run's key is made of: once the missing package is there, the run is another one.
    """
    if device is None:
        device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    optimizer, missing = usable_optimizer(config.optimizer, device)
    if config.optimizer == "prodigy" and missing and config.learning_rate >= PRODIGY_RATE:
        usual = TrainConfig.learning_rate  # prodigy's 1 would destroy an adapter in adamw's hands
        return replace(config, optimizer=optimizer, learning_rate=usual), f"{missing} at a learning rate of {usual:g}"
    return replace(config, optimizer=optimizer), missing


def usable_optimizer(name: str, device: torch.device) -> tuple[str, str]:
    """The optimizer that is used where ``name`` is asked for, and a sentence when that is another one."""
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
