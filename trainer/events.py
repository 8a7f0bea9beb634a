"""What a run tells while it goes on: small frozen values that a node, a shell or a test reads."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch


@dataclass(frozen=True)
class Started:
    """The model is built and the first step is about to run.

    Attributes:
        step: steps already done (above 0 when the run goes on from a checkpoint).
        steps: steps in all.
        chosen: what every ``auto`` setting became, and on which device.
        trainable_parameters: weights that are trained.
        notes: sentences for the user, such as an option that fell back.
        plan: one line about what will be in memory.
    """

    step: int
    steps: int
    chosen: dict[str, str]
    trainable_parameters: int
    notes: tuple[str, ...] = ()
    plan: str = ""


@dataclass(frozen=True)
class StepDone:
    """One optimizer update.

    Attributes:
        step: steps done so far, this one included.
        steps: steps in all.
        loss: the weighted sum of its terms, the mean over the step's batches.
        losses: its terms by name, unweighted: "instance_loss", the mean squared error on the photos, and what the way
            to keep the class adds, such as "prior_loss", that on the class images.
        learning_rate: the rate this update used.
        grad_norm: the gradient's norm before clipping.
        seconds: how long this step took.
        eta_seconds: an estimate of what is left, validation pictures included; None for the first steps.
    """

    step: int
    steps: int
    loss: float
    losses: Mapping[str, float]
    learning_rate: float
    grad_norm: float
    seconds: float
    eta_seconds: float | None


@dataclass(frozen=True)
class Adjusted:
    """The run had to change something to go on, such as using less memory.

    Attributes:
        step: steps done.
        note: a sentence for the user.
        chosen: what the run uses now.
    """

    step: int
    note: str
    chosen: dict[str, str]


@dataclass(frozen=True)
class ValidationStep:
    """One denoising step of the validation pictures, so that a cancel need not wait for the whole picture."""

    step: int
    done: int
    total: int


@dataclass(frozen=True)
class Validation:
    """Validation pictures.

    Attributes:
        step: training steps done when they were drawn.
        prompts: one a picture.
        images: float32 [n, h, w, 3] in 0..1, on the CPU.
        sampling_steps, guidance_scale: what they were drawn with.
    """

    step: int
    prompts: tuple[str, ...]
    images: torch.Tensor
    sampling_steps: int = 0
    guidance_scale: float = 0.0


@dataclass(frozen=True)
class CheckpointSaved:
    """Everything a resume needs is on the disk."""

    step: int
    path: Path


@dataclass(frozen=True)
class Finished:
    """The adapter is written.

    Attributes:
        step: steps done.
        path: the LoRA file in the run's folder.
        trained: False when the run was finished before and nothing was trained now.
        warning: a sentence for the user when the adapter learned nothing; else empty.
    """

    step: int
    path: Path
    trained: bool
    warning: str = ""


Event = Started | StepDone | Adjusted | ValidationStep | Validation | CheckpointSaved | Finished


def to_json(event: Event) -> dict[str, Any]:
    """The event as a JSON object with its kind under ``"event"``; pictures and absolute paths stay out."""
    if isinstance(event, Validation):
        values: dict[str, Any] = {
            "step": event.step,
            "prompts": list(event.prompts),
            "sampling_steps": event.sampling_steps,
            "guidance_scale": event.guidance_scale,
        }
    else:
        values = asdict(event)
        values |= values.pop("losses", {})
    if "path" in values:
        values["path"] = Path(values["path"]).name
    return {"event": type(event).__name__, **values}
