"""What a run will keep in memory, before its first step, and the settings that make it fit.

Weights, gradients and optimizer states are counted exactly, the network's activations by
:mod:`trainer.memory.footprint`.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

import torch

from ..base.conditioning import Conditioning
from ..base.denoiser import Denoiser
from ..base.trainable_text import TrainableText
from ..config import AUTO, TrainConfig
from ..machine.numerics import DTYPES
from ..machine.resolved_settings import ResolvedSettings
from .footprint import Footprint, training_footprint

if TYPE_CHECKING:
    from torch import nn

logger = logging.getLogger("subjectbooth")

SHARE = 0.9
"""Of the free memory that a plan fills: the rest is for what is not counted (workspaces, fragments, validation)."""

FreeMemory = Callable[[torch.device], "int | None"]
"""Bytes free on a device, None when nobody can say."""


@dataclass(frozen=True)
class Load:
    """What one step takes in.

    Attributes:
        conditioning: the longest that a picture gets, batch size 1.
        size: height and width of the largest latents.
        pictures: of one whole batch, class images included.
        text_tokens: what a trained text encoder takes in: of the subject's prompts and the class's, once each.
    """

    conditioning: Conditioning
    size: tuple[int, int]
    pictures: int
    text_tokens: int = 2 * 77


@dataclass(frozen=True)
class Plan:
    """Bytes by what they are for, and what was chosen because of them.

    Attributes:
        base: the frozen weights.
        adapter: the trained weights, their gradients and their running average.
        optimizer: its states.
        activations: of one forward and backward pass; None when they could not be counted.
        free: what the device has for all of it; None when that is not known.
        pictures: of one whole batch.
        chosen: what makes it fit, or comes closest.
    """

    base: int
    adapter: int
    optimizer: int
    activations: int | None
    free: int | None
    pictures: int
    chosen: ResolvedSettings

    @property
    def needed(self) -> int:
        """Bytes in all."""
        return self.base + self.adapter + self.optimizer + (self.activations or 0)

    @property
    def fits(self) -> bool:
        """Whether it does, as far as is known."""
        return self.free is None or self.needed <= SHARE * self.free

    @property
    def sentence(self) -> str:
        """One line for the user."""
        parts = f"base {_gb(self.base)} + adapter {_gb(self.adapter)} + optimizer {_gb(self.optimizer)}"
        parts += " + activations " + ("(unknown)" if self.activations is None else _gb(self.activations))
        free = f" of {_gb(self.free)} GB free" if self.free is not None else " GB (free memory unknown)"
        return (
            f"plan: {parts} = {_gb(self.needed)}{free}; {self.chosen.precision}, {self.chosen.optimizer}, "
            f"checkpointing {'on' if self.chosen.gradient_checkpointing else 'off'}, "
            f"{self.chosen.micro_batch} of {self.pictures} pictures at once"
        )

    @property
    def warning(self) -> str:
        """What would help where it will probably not fit; empty where it does."""
        if self.fits:
            return ""
        helps = ["a lower resolution", "a lower rank"]
        helps += ["the optimizer adamw8bit"] if self.chosen.optimizer in ("adamw", "prodigy") else []
        helps += ["precision auto"] if self.chosen.precision == "fp32" else []
        return (
            f"this will probably not fit: {_gb(self.needed)} GB needed, {_gb(self.free or 0)} GB free; "
            f"what would help: {', '.join(helps)}"
        )


def make_plan(
    config: TrainConfig,
    chosen: ResolvedSettings,
    kept: ResolvedSettings | None,
    denoiser: Denoiser,
    network: nn.Module,
    text: TrainableText | None,
    text_encoders: Sequence[nn.Module],
    load: Load,
    free: int | None,
) -> Plan:
    """Count, and choose what is left to choose.

    Args:
        config: the requested settings.
        chosen: with precision and optimizer, which do not depend on the memory.
        kept: what a resumed run chose at its start, which is kept.
        denoiser: whose network it is.
        network, text_encoders: what is trained, with the LoRA in place.
        text: whose text encoders these are.
        load: what one step takes in.
        free: bytes, with none of the modules on the device; None when nobody can say.
    """
    modules = [network, *text_encoders]
    trained = [parameter for module in modules for parameter in module.parameters() if parameter.requires_grad]
    ours = {id(parameter) for parameter in trained}
    base = sum(
        tensor.nbytes
        for module in modules
        for tensor in (*module.parameters(), *module.buffers())
        if id(tensor) not in ours
    )
    weights = sum(parameter.nbytes for parameter in trained)
    adapter = weights * (3 if config.ema_decay else 2)
    optimizer = optimizer_bytes(chosen.optimizer, trained)
    dtype = DTYPES[chosen.precision]
    footprint = _footprint(denoiser, network, load, dtype)
    text_bytes = text.activation_bytes(load.text_tokens, dtype) if text is not None and text_encoders else 0

    plans = []
    for checkpointing, pictures in _candidates(config, kept, load.pictures):
        activations = None
        if footprint is not None:
            each = footprint.checkpointed if checkpointing else footprint.whole
            activations = text_bytes + each * pictures
        settings = replace(chosen, gradient_checkpointing=checkpointing, micro_batch=pictures)
        plans.append(Plan(base, adapter, optimizer, activations, free, load.pictures, settings))
        if plans[-1].fits:
            break
    return plans[-1]


def pictures_that_fit(needed: Callable[[int], float], free: float, most: int) -> int:
    """The most pictures up to ``most`` whose bytes fit; never fewer than one, which is tried in any case.

    Args:
        needed: bytes of so many pictures.
        free: bytes.
    """
    return next((count for count in range(most, 1, -1) if needed(count) <= SHARE * free), 1)


def optimizer_bytes(name: str, parameters: Sequence[torch.Tensor]) -> int:
    """Bytes of an optimizer's states once it has made a step."""
    if name == "adafactor":  # one number a row and a column in place of one a weight
        return sum(
            4 * (tensor.numel() // tensor.shape[-1] + tensor.numel() // tensor.shape[-2])
            if tensor.ndim > 1
            else 4 * tensor.numel()
            for tensor in parameters
        )
    if name == "adamw8bit":  # two bytes, and two float32 scales every 256 weights; small tensors stay in float32
        return sum(
            8 * tensor.numel() if tensor.numel() < 4096 else 2 * tensor.numel() + 8 * tensor.numel() // 256
            for tensor in parameters
        )
    each = 16 if name == "prodigy" else 8
    return sum(each * tensor.numel() for tensor in parameters)


def _candidates(config: TrainConfig, kept: ResolvedSettings | None, pictures: int) -> list[tuple[bool, int]]:
    """Gradient checkpointing and pictures at once, the fastest first.

    Halving the pictures once costs less than computing everything twice; halving them again does not.
    """
    checkpointing, asked = config.gradient_checkpointing, config.pictures_per_forward
    # What a run stepped down to stays; who asks for less memory since then gets it.
    if kept is not None:
        if checkpointing != "on":
            checkpointing = "on" if kept.gradient_checkpointing else "off"
        asked = min(asked or kept.micro_batch, kept.micro_batch)
    counts = [min(asked, pictures)] if asked else _halves(pictures)
    found = []
    if checkpointing != "on":
        found += [(False, count) for count in (counts[:2] if checkpointing == AUTO else counts)]
    if checkpointing != "off":
        found += [(True, count) for count in counts]
    return found


def _halves(count: int) -> list[int]:
    counts = [count]
    while counts[-1] > 1:
        counts.append((counts[-1] + 1) // 2)
    return counts


_counted: dict[Any, Footprint] = {}


def _footprint(denoiser: Denoiser, network: nn.Module, load: Load, dtype: torch.dtype) -> Footprint | None:
    """Counting takes seconds for SDXL: once a process for every layout, size and precision."""
    pooled = load.conditioning.pooled
    layout = tuple((name, tensor.shape, tensor.requires_grad) for name, tensor in network.named_parameters())
    key = (
        hash(layout),
        load.size,
        dtype,
        load.conditioning.hidden_states.shape,
        pooled.shape if pooled is not None else None,
    )
    if key not in _counted:
        try:
            _counted[key] = training_footprint(denoiser, network, load.conditioning, load.size, dtype)
        except Exception:  # a plan is a help: what it cannot count (another diffusers, another torch) ends no run
            logger.warning("the memory of a training step could not be counted", exc_info=True)
            return None
    return _counted[key]


def _gb(count: int) -> str:
    return f"{count / 1e9:.2f}"
