"""Logs a run's settings, curves and images to TensorBoard or Weights & Biases.

Training never depends on a tracker: if a package is missing or a service fails, you get one warning and training
continues.
"""

from __future__ import annotations

import importlib.util
import json
from collections.abc import Callable
from typing import Any, Protocol

from ..config import TrainConfig
from ..events import Event, Scores, Started, StepDone, Validation
from ..runs.folder import RunFolder

CURVES = ("loss", "learning_rate", "grad_norm", "seconds")
"""Fields of StepDone that are logged in addition to the terms of the loss."""

Scalars = dict[str, float]


class Backend(Protocol):
    """The interface of a tracker. ``step`` counts optimizer updates."""

    def log_scalars(self, values: Scalars, step: int) -> None: ...

    def log_images(self, event: Validation) -> None: ...

    def close(self) -> None: ...


class TensorBoard:
    """Writes event files to ``tensorboard`` in the run's folder.

    Args:
        folder: the run's folder.
        settings: logged as text.
        step: the step from which the run starts or resumes; later values of an earlier start are hidden.
    """

    def __init__(self, folder: RunFolder, settings: dict[str, Any], step: int) -> None:
        from torch.utils.tensorboard import SummaryWriter

        self._writer = SummaryWriter(str(folder.path / "tensorboard"), purge_step=step + 1)
        shown = json.dumps(settings, indent=1, ensure_ascii=False)
        self._writer.add_text("settings", "\n".join("    " + line for line in shown.split("\n")), step + 1)

    def log_scalars(self, values: Scalars, step: int) -> None:
        for name, value in values.items():
            self._writer.add_scalar(name, value, step)

    def log_images(self, event: Validation) -> None:
        for prompt, image in zip(event.prompts, event.images, strict=True):
            self._writer.add_image(prompt, image, event.step, dataformats="HWC")
        self._writer.flush()

    def close(self) -> None:
        self._writer.close()


WANDB_SETTINGS: dict[str, Any] = {
    "disable_git": True,
    "save_code": False,
    "console": "off",
    "host": "-",
    "x_disable_meta": True,
    "x_disable_machine_info": True,
    "x_disable_stats": True,
    "x_save_requirements": False,
}
"""Disables what W&B collects by default: command line with its paths, machine, installed packages. Names that start
with x_ may be missing in other versions."""


class WandB:
    """Logs to the W&B project ``subjectbooth`` under an id from the run's key, so a resumed run continues its curves.

    Login, host and offline mode are wandb's own (``wandb login``, ``WANDB_BASE_URL``, ``WANDB_MODE=offline``); its
    files lie in the run's folder.

    Args:
        folder: the run's folder.
        settings: logged as the run's config.
        step: unused; the steps are logged as values, because wandb's own counter cannot go back to a checkpoint.
    """

    def __init__(self, folder: RunFolder, settings: dict[str, Any], step: int) -> None:
        import wandb

        self._wandb, self._folder = wandb, folder
        supported = {name: value for name, value in WANDB_SETTINGS.items() if name in wandb.Settings.model_fields}
        self._run = wandb.init(
            project="subjectbooth",
            name=folder.path.name,
            id=folder.key[:16],
            resume="allow",
            config=settings,
            dir=str(folder.path),
            settings=wandb.Settings(**supported),
        )
        self._run.define_metric("*", step_metric="step")

    def log_scalars(self, values: Scalars, step: int) -> None:
        self._run.log({"step": step, **values})

    def log_images(self, event: Validation) -> None:
        paths = self._folder.validation_paths(event.step, len(event.prompts))
        images = [
            self._wandb.Image(str(path), caption=prompt) for prompt, path in zip(event.prompts, paths, strict=True)
        ]
        self._run.log({"step": event.step, "validation": images})

    def close(self) -> None:
        self._run.finish()


BACKENDS: dict[str, Callable[[RunFolder, dict[str, Any], int], Backend]] = {"tensorboard": TensorBoard, "wandb": WandB}
"""Trackers by name, which is also the name of the package."""

TRACKERS = ("none", *BACKENDS)


class Tracker:
    """Logs the events of one run to a tracker.

    Args:
        name: one of TRACKERS.
        folder: the run's folder.
        config: its settings.
        warn: shows a sentence to the user.
    """

    def __init__(self, name: str, folder: RunFolder, config: TrainConfig, warn: Callable[[str], None]) -> None:
        self._folder, self._config, self._warn = folder, config, warn
        self._name = name
        self._is_active = name in BACKENDS
        self._backend: Backend | None = None

    def follow(self, event: Event) -> None:
        """Log an event. The tracker is opened when training starts, so reusing a finished run logs nothing."""
        if self._is_active and isinstance(event, Started) and importlib.util.find_spec(self._name) is None:
            self._give_up(f"the package {self._name} is not installed")
        if not self._is_active:
            return
        try:
            self._follow(event)
        except Exception as error:  # a service can fail in any way and must not end the training
            self._give_up(f"{type(error).__name__}: {error}")

    def close(self) -> None:
        """Flush and close the tracker."""
        backend, self._backend = self._backend, None
        if backend is not None:
            try:
                backend.close()
            except Exception as error:
                self._give_up(f"{type(error).__name__}: {error}", what_next="the run is not affected")

    def _follow(self, event: Event) -> None:
        if isinstance(event, Started):
            settings = {**self._config.to_json(), "chosen": event.chosen}
            self._backend = BACKENDS[self._name](self._folder, settings, event.step)
        elif isinstance(event, StepDone) and self._backend:
            values = {name: getattr(event, name) for name in CURVES}
            self._backend.log_scalars({**values, **event.losses}, event.step)
        elif isinstance(event, Scores) and self._backend:
            self._backend.log_scalars({f"scores/{name}": value for name, value in event.values.items()}, event.step)
        elif isinstance(event, Validation) and self._backend:
            self._backend.log_images(event)

    def _give_up(self, why: str, what_next: str = "training continues") -> None:
        self._is_active, self._backend = False, None
        self._warn(f"this run is no longer logged to {self._name} ({why}); {what_next}")
