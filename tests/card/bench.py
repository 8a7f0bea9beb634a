"""Where the checks of a GPU run, and one training there."""

from __future__ import annotations

import gc
from dataclasses import dataclass, field
from functools import cache
from pathlib import Path
from typing import Any

import torch

from subjectbooth.trainer.base.base_model import BaseModel
from subjectbooth.trainer.config import TrainConfig
from subjectbooth.trainer.events import Adjusted, StepDone, Validation
from subjectbooth.trainer.learn.checkpoint import Checkpoint
from subjectbooth.trainer.learn.data import TrainingData
from subjectbooth.trainer.learn.loop import Training
from subjectbooth.trainer.machine.resolved_settings import ResolvedSettings
from subjectbooth.trainer.memory.plan import FreeMemory, Plan
from subjectbooth.trainer.preserve.class_images import ClassImages
from subjectbooth.trainer.preserve.priors import ClassPriors

from .base import random_base, random_weights

CAPTIONS = ("a photo of ohwx dog", "ohwx dog on a beach", "ohwx dog, from above")
CLASS_PROMPT = "a photo of a dog"


class NotHere(Exception):
    """This machine lacks something that the check needs; the message says what."""


@dataclass(frozen=True)
class Bench:
    """Where the checks run.

    Attributes:
        device: the card, or a CPU.
        small: with a small model.
        comfyui: its folder; None without one.
    """

    device: torch.device
    small: bool = False
    comfyui: Path | None = None

    @property
    def side(self) -> int:
        """Pixels of the pictures where their size does not matter."""
        return 64 if self.small else 256

    def needs_card(self) -> None:
        """
        Raises:
            NotHere: this is a CPU.
        """
        if self.device.type != "cuda":
            raise NotHere("needs an NVIDIA GPU")


@dataclass
class Trained:
    """What came out of one training.

    Attributes:
        peak: bytes on the card at the most, beside what was there before; 0 on a CPU.
    """

    losses: list[float] = field(default_factory=list)
    norms: list[float] = field(default_factory=list)
    notes: list[str] = field(default_factory=list)
    pictures: list[torch.Tensor] = field(default_factory=list)
    seconds: list[float] = field(default_factory=list)
    chosen: ResolvedSettings = field(default_factory=lambda: ResolvedSettings(""))
    lora: dict[str, torch.Tensor] = field(default_factory=dict)
    kept: Checkpoint | None = None
    plan: Plan | None = None
    peak: int = 0


@cache
def base_on(bench: Bench, name: str = "sd1") -> BaseModel:
    """One base of random weights for all checks of a process."""
    base = random_base(name, lambda: random_weights(bench.device), bench.small)
    if hasattr(base.codec, "device"):
        base.codec.device = bench.device
    return base


def train(
    bench: Bench,
    name: str = "sd1",
    *,
    kept: Checkpoint | None = None,
    stop: int = 0,
    free: FreeMemory | None = None,
    **settings: Any,
) -> Trained:
    """A training on random latents. Afterwards the card is as empty as before.

    Args:
        kept: where to go on.
        stop: after so many steps; 0 for all of them.
        settings: of :class:`TrainConfig`.
    """
    base = base_on(bench, "sd1" if bench.small else name)
    config = TrainConfig(
        **{
            "steps": 4,
            "resolution": bench.side,
            "learning_rate": 1e-3,
            "rank": 8,
            "network_alpha": 8.0,
            "precision": "fp32",
            **settings,
        }
    )
    shown = (CAPTIONS[0],) if config.validation_prompts else ()
    found = Trained()
    cuda = bench.device.type == "cuda"
    before = empty(bench)
    with Training(base, _data(base, config), config, shown, kept, bench.device, free) as training:
        events = training.events()
        for event in events:
            if isinstance(event, StepDone):
                found.losses.append(event.loss)
                found.norms.append(event.grad_norm)
                found.seconds.append(event.seconds)
                if event.step == stop:
                    break
            elif isinstance(event, Validation):
                found.pictures.append(event.images)
            elif isinstance(event, Adjusted):
                found.notes.append(event.note)
        found.chosen, found.lora, found.kept = training.chosen, training.lora(), training.snapshot()
        assert training._assembly is not None
        found.plan = training._assembly.plan
        events.close()
    if cuda:
        found.peak = torch.cuda.max_memory_allocated(bench.device) - before
    del training, events
    empty(bench)
    return found


def empty(bench: Bench) -> int:
    """Bytes on the card that are still in use after a clean-up; starts the next peak."""
    gc.collect()
    if bench.device.type != "cuda":
        return 0
    torch.cuda.empty_cache()
    torch.cuda.reset_peak_memory_stats(bench.device)
    return torch.cuda.memory_allocated(bench.device)


def _data(base: BaseModel, config: TrainConfig) -> TrainingData:
    prompts = (*CAPTIONS, CLASS_PROMPT, "")
    side = config.resolution // 8
    generator = torch.Generator().manual_seed(1)
    if id(base) not in _prompts:
        _prompts[id(base)] = dict(zip(prompts, base.prompts.encode(prompts), strict=True))
    return TrainingData(
        torch.randn(3, 4, side, side, generator=generator),
        CAPTIONS,
        _prompts[id(base)],
        ClassImages(ClassPriors(torch.randn(4, 4, side, side, generator=generator), CLASS_PROMPT, (), "")),
    )


_prompts: dict[int, dict[str, Any]] = {}
