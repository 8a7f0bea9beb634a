"""The events that a run yields: small frozen values, read by a node, the CLI or a test."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import torch


@dataclass(frozen=True)
class Started:
    """The model is built and the first step is about to run.

    Attributes:
        step: steps already done (above 0 for a resumed run).
        steps: total steps.
        chosen: the resolved value of every ``auto`` setting, and the device.
        trainable_parameters: number of weights that are trained.
        notes: sentences for the user, for example about an option that is unavailable.
        plan: one line about the expected memory use.
        memory: the bytes that were counted, see :attr:`trainer.memory.plan.Plan.counts`.
    """

    step: int
    steps: int
    chosen: dict[str, str]
    trainable_parameters: int
    notes: tuple[str, ...] = ()
    plan: str = ""
    memory: Mapping[str, int] = field(default_factory=dict)


@dataclass(frozen=True)
class Studying:
    """Class preservation studies the base before the first step.

    Attributes:
        step: training steps done.
        done, total: images.
    """

    step: int
    done: int
    total: int


@dataclass(frozen=True)
class StepDone:
    """One optimizer update.

    Attributes:
        step: steps done so far, including this one.
        steps: total steps.
        loss: the weighted sum of the terms, averaged over the step's batches.
        losses: the unweighted terms by name: "instance_loss" is the mean squared error on the photos; class
            preservation adds its own, such as "prior_loss" for the class images.
        learning_rate: learning rate of this update.
        grad_norm: norm of the gradient before clipping.
        seconds: duration of this step.
        eta_seconds: estimated time left, including validation images; None for the first steps.
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
    """The run changed a setting in order to continue, for example to use less memory.

    Attributes:
        step: steps done.
        note: a sentence for the user.
        chosen: the settings in use now.
    """

    step: int
    note: str
    chosen: dict[str, str]


@dataclass(frozen=True)
class ValidationStep:
    """One denoising step of the validation images, so that cancelling does not have to wait for a whole image."""

    step: int
    done: int
    total: int


@dataclass(frozen=True)
class Validation:
    """Validation images.

    Attributes:
        step: training steps done when they were sampled.
        prompts: one per image.
        images: float32 [n, h, w, 3] in 0..1, on the CPU.
        sampling_steps, guidance_scale: the sampler's settings.
    """

    step: int
    prompts: tuple[str, ...]
    images: torch.Tensor
    sampling_steps: int = 0
    guidance_scale: float = 0.0


@dataclass(frozen=True)
class Scores:
    """Scores of the adapter (see :class:`trainer.learn.probe.Probe`), or what an evaluator made of the event before.

    Attributes:
        step: training steps done with the scored adapter; 0 for the base, also when a run resumes.
        values: numbers by name.
    """

    step: int
    values: Mapping[str, float]


@dataclass(frozen=True)
class CheckpointSaved:
    """Everything needed to resume is on disk."""

    step: int
    path: Path


@dataclass(frozen=True)
class Finished:
    """The LoRA file is written.

    Attributes:
        step: steps done.
        path: the LoRA file in the run's folder.
        trained: False if the run had already finished and nothing was trained now.
        warning: a sentence for the user if the LoRA learned nothing, otherwise empty.
    """

    step: int
    path: Path
    trained: bool
    warning: str = ""


Event = Started | Studying | StepDone | Adjusted | ValidationStep | Validation | Scores | CheckpointSaved | Finished


def to_json(event: Event) -> dict[str, Any]:
    """The event as a JSON object with its type under ``"event"``, without images and absolute paths."""
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
