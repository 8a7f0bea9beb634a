"""Plans a run's memory before its first step, and chooses settings that fit.

Weights, gradients and optimizer state are counted exactly, activations by :mod:`trainer.memory.footprint`.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

import torch

from ..base.conditioning import Conditioning
from ..base.denoiser import Denoiser, frozen_bytes
from ..base.trainable_text import TrainableText
from ..config import AUTO, TrainConfig
from ..machine.numerics import DTYPES
from ..machine.resolved_settings import ResolvedSettings
from .footprint import Footprint, training_footprint
from .whole_step import step_footprint

if TYPE_CHECKING:
    from torch import nn

logger = logging.getLogger("subjectbooth")

SHARE = 0.9
"""Share of the free memory to plan with; the rest is for workspaces, fragmentation and validation."""

FreeMemory = Callable[[torch.device], "int | None"]
"""Returns the bytes free on a device; None if unknown."""


@dataclass(frozen=True)
class Load:
    """The inputs of a step.

    Attributes:
        conditioning: the longest one, batch size 1.
        size: height and width of the largest latents.
        pictures: images in a batch, class images included.
        text_tokens: tokens of all distinct prompts in a batch, for a trained text encoder.
        is_studied: whether class preservation studies the base and keeps what it learned.
    """

    conditioning: Conditioning
    size: tuple[int, int]
    pictures: int
    text_tokens: int = 2 * 77
    is_studied: bool = False

    def share(self, processes: int) -> Load:
        """The inputs of one process's part of the step."""
        return replace(self, pictures=-(-self.pictures // processes))


@dataclass(frozen=True)
class Plan:
    """Planned bytes by purpose, and the chosen settings.

    Attributes:
        base: the frozen weights.
        adapter: the trained weights, their gradients and their running average, and their copies in half precision.
        optimizer: optimizer state.
        activations: of one forward and backward pass; None if they could not be counted.
        free: bytes available on the device; None if unknown.
        pictures: images in a batch.
        chosen: the settings that fit, or come closest.
        preservation: what class preservation keeps on the device.
        can_offload: whether the base need not be on the device as a whole.
        footprint: of one image; None if it could not be counted.
        text: activations of a trained text encoder.
    """

    base: int
    adapter: int
    optimizer: int
    activations: int | None
    free: int | None
    pictures: int
    chosen: ResolvedSettings
    preservation: int = 0
    can_offload: bool = False
    footprint: Footprint | None = None
    text: int = 0

    @property
    def beside_base(self) -> int:
        """Bytes in total without the base."""
        return self.needed - self.base

    @property
    def counts(self) -> dict[str, int]:
        """What was counted, for a run's log; from it :func:`replan` plans a run with other settings."""
        names = ("base", "adapter", "optimizer", "preservation", "text", "pictures", "can_offload")
        counted = {name: int(getattr(self, name)) for name in names}
        if self.footprint is not None:
            counted |= {"whole": self.footprint.whole, "checkpointed": self.footprint.checkpointed}
        return counted

    @property
    def needed(self) -> int:
        """Bytes in total."""
        return self.base + self.adapter + self.optimizer + self.preservation + (self.activations or 0)

    @property
    def fits(self) -> bool:
        """Whether the plan fits; true if the free memory is unknown."""
        return self.free is None or self.needed <= SHARE * self.free

    @property
    def offloads(self) -> bool:
        """Whether it fits if part of the base stays in system memory, and only then."""
        return not self.fits and self.can_offload and self.beside_base <= SHARE * (self.free or 0)

    @property
    def sentence(self) -> str:
        """A line for the user."""
        parts = f"base {_gb(self.base)} + adapter {_gb(self.adapter)} + optimizer {_gb(self.optimizer)}"
        parts += f" + class preservation {_gb(self.preservation)}" if self.preservation else ""
        parts += " + activations " + ("(unknown)" if self.activations is None else _gb(self.activations))
        free = f" of {_gb(self.free)} GB free" if self.free is not None else " GB (free memory unknown)"
        return (
            f"plan: {parts} = {_gb(self.needed)}{free}; {self.chosen.precision}, {self.chosen.optimizer}, "
            f"checkpointing {'on' if self.chosen.gradient_checkpointing else 'off'}, "
            f"{self.pictures} image{'s' if self.pictures > 1 else ''} in micro-batches of {self.chosen.micro_batch}"
        )

    @property
    def warning(self) -> str:
        """Advice if the plan does not fit; empty if it does."""
        if self.fits:
            return ""
        if self.offloads and self.free is not None:
            stays = self.needed - SHARE * self.free
            return (
                f"about {_gb(int(stays))} GB of the base stay in system memory and are copied in every step, "
                "which makes training slower"
            )
        helps = ["a lower resolution", "a lower rank"]
        helps += ["the optimizer adamw8bit"] if self.chosen.optimizer in ("adamw", "prodigy") else []
        helps += ["precision auto"] if self.chosen.precision == "fp32" else []
        return (
            f"this will probably not fit: {_gb(self.needed)} GB needed, {_gb(self.free or 0)} GB free; "
            f"to lower it, use {', '.join(helps)}"
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
    preservation: int = 0,
) -> Plan:
    """Count memory, and choose gradient checkpointing and the micro-batch size.

    Args:
        config: the requested settings.
        chosen: with precision and optimizer already chosen.
        kept: the choices that a resumed run started with.
        denoiser: the denoiser of the network.
        network, text_encoders: the trained modules, with their LoRA.
        text: the interface to the text encoders.
        load: the inputs of a step.
        free: bytes free before the modules are moved to the device; None if unknown.
        preservation: bytes that class preservation keeps on the device.
    """
    modules = [network, *text_encoders]
    trained = [parameter for module in modules for parameter in module.parameters() if parameter.requires_grad]
    base = denoiser.base_bytes(network) + sum(frozen_bytes(model) for model in text_encoders)
    weights = sum(parameter.nbytes for parameter in trained)
    # In half precision, weights and gradients are there in half as well.
    adapter = weights * ((3 if config.ema_decay else 2) + (chosen.precision != "fp32"))
    optimizer = optimizer_bytes(chosen.optimizer, trained)
    dtype = DTYPES[chosen.precision]
    footprint = _footprint(denoiser, network, load, dtype)
    text_bytes = text.activation_bytes(load.text_tokens, dtype) if text is not None and text_encoders else 0

    plan = Plan(
        base,
        adapter,
        optimizer,
        None,
        free,
        load.pictures,
        chosen,
        preservation,
        denoiser.can_offload,
        footprint,
        text_bytes,
    )
    return _fitting(plan, config, kept)


def replan(
    counts: Mapping[str, int],
    counted: TrainConfig,
    config: TrainConfig,
    pictures: int,
    chosen: ResolvedSettings,
    free: int | None,
) -> Plan:
    """Plan a run from what an earlier run of the same base counted, without the model.

    Weights, gradients and optimizer state are proportional to the rank, activations to the area of an image.

    Args:
        counts: of the earlier run, see :attr:`Plan.counts`.
        counted: the settings of the earlier run.
        config: the requested settings.
        pictures: images in a batch.
        chosen: with precision and optimizer already chosen.
        free: bytes free; None if unknown.
    """
    rank, area = config.rank / counted.rank, (config.resolution / counted.resolution) ** 2
    footprint = None
    if "whole" in counts and "checkpointed" in counts:
        footprint = Footprint(round(counts["whole"] * area), round(counts["checkpointed"] * area))
    scaled = Plan(
        base=counts.get("base", 0),
        adapter=round(counts.get("adapter", 0) * rank),
        optimizer=round(counts.get("optimizer", 0) * rank),
        activations=None,
        free=free,
        pictures=pictures,
        chosen=chosen,
        preservation=counts.get("preservation", 0),
        can_offload=bool(counts.get("can_offload")),
        footprint=footprint,
        text=counts.get("text", 0),
    )
    return _fitting(scaled, config, None)


def _fitting(plan: Plan, config: TrainConfig, kept: ResolvedSettings | None) -> Plan:
    """The plan with the fastest gradient checkpointing and micro-batch size that fit, or else the smallest."""
    footprint, chosen = plan.footprint, plan.chosen
    candidates = _candidates(config, kept, plan.pictures)
    if footprint is None and not chosen.device.startswith("cpu"):
        # What is not counted may be large, and a step that fails costs more than blocks that are computed again.
        candidates = [pair for pair in candidates if pair[0]] or candidates
    plans = []
    for checkpointing, micro_batch in candidates:
        activations = None
        if footprint is not None:
            each = footprint.checkpointed if checkpointing else footprint.whole
            activations = plan.text + each * micro_batch
        settings = replace(chosen, gradient_checkpointing=checkpointing, micro_batch=micro_batch)
        plans.append(replace(plan, activations=activations, chosen=settings))
        if plans[-1].fits:
            break
    return plans[-1]


def pictures_that_fit(needed: Callable[[int], float], free: float, most: int) -> int:
    """The largest number of images, from 1 to ``most``, that fits; 1 even if that does not.

    Args:
        needed: from a number of images to bytes.
        free: bytes free.
    """
    return next((count for count in range(most, 1, -1) if needed(count) <= SHARE * free), 1)


def optimizer_bytes(name: str, parameters: Sequence[torch.Tensor]) -> int:
    """Bytes of an optimizer's state after its first step."""
    if name == "adafactor":  # one number per row and per column instead of per weight
        return sum(
            4 * (tensor.numel() // tensor.shape[-1] + tensor.numel() // tensor.shape[-2])
            if tensor.ndim > 1
            else 4 * tensor.numel()
            for tensor in parameters
        )
    if name == "adamw8bit":  # two bytes per weight, and two float32 scales per 256; small tensors stay in float32
        return sum(
            8 * tensor.numel() if tensor.numel() < 4096 else 2 * tensor.numel() + 8 * tensor.numel() // 256
            for tensor in parameters
        )
    each = 16 if name == "prodigy" else 8
    return sum(each * tensor.numel() for tensor in parameters)


def _candidates(config: TrainConfig, kept: ResolvedSettings | None, pictures: int) -> list[tuple[bool, int]]:
    """Gradient checkpointing and micro-batch size, fastest first.

    Halving the micro-batch size once costs less than recomputing activations; halving it again does not.
    """
    checkpointing, requested = config.gradient_checkpointing, config.pictures_per_forward
    # A run keeps what it stepped down to, unless the settings now ask for even less.
    if kept is not None:
        if checkpointing != "on":
            checkpointing = "on" if kept.gradient_checkpointing else "off"
        requested = min(requested or kept.micro_batch, kept.micro_batch)
    sizes = [min(requested, pictures)] if requested else _halves(pictures)
    found = []
    if checkpointing != "on":
        found += [(False, size) for size in (sizes[:2] if checkpointing == AUTO else sizes)]
    if checkpointing != "off":
        found += [(True, size) for size in sizes]
    return found


def _halves(count: int) -> list[int]:
    counts = [count]
    while counts[-1] > 1:
        counts.append((counts[-1] + 1) // 2)
    return counts


_counted: dict[Any, Footprint] = {}


def _footprint(denoiser: Denoiser, network: nn.Module, load: Load, dtype: torch.dtype) -> Footprint | None:
    """Cached by layout, size and precision, because counting takes seconds for SDXL."""
    layout = tuple((name, tensor.shape, tensor.requires_grad) for name, tensor in network.named_parameters())
    key = (
        hash(layout),
        load.size,
        dtype,
        tuple(tensor.shape for tensor in load.conditioning.tensors),
    )
    if key not in _counted:
        try:
            count = training_footprint if denoiser.blocks(network) else step_footprint
            _counted[key] = count(denoiser, network, load.conditioning, load.size, dtype)
        except NotImplementedError:  # the denoiser says that it cannot be counted
            return None
        except Exception:  # not essential: counting may fail with other versions of diffusers or torch
            logger.warning("the memory of a training step could not be estimated", exc_info=True)
            return None
    return _counted[key]


def _gb(count: int) -> str:
    return f"{count / 1e9:.2f}"
