"""A run's settings, curves and pictures in TensorBoard or Weights & Biases, for the shell.

Training never depends on it: a package that is missing, a service that does not answer or refuses is said once, and the
run goes on without.
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
"""What of a step is shown besides the terms of its loss, see StepDone."""

Scalars = dict[str, float]


class Backend(Protocol):
    """What a tracker has to be able to do. ``step`` counts optimizer updates; pictures are as in Validation."""

    def log_scalars(self, values: Scalars, step: int) -> None: ...

    def log_images(self, event: Validation) -> None: ...

    def close(self) -> None: ...


class TensorBoard:
    """Event files in the run's folder, below ``tensorboard``.

    Args:
        folder: the run's.
        settings: shown as text.
        step: the step that the run goes on from; what an earlier part logged beyond it is hidden.
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
"""What W&B would send of its own accord (command line with its paths, machine, installed packages) stays here. Names
that begin with x_ may go in another version."""


class WandB:
    """A run of the project ``subjectbooth``, by the run's key: a run that goes on continues its curves.

    Login, host and offline mode are wandb's own (``wandb login``, ``WANDB_BASE_URL``, ``WANDB_MODE=offline``); its
    files lie in the run's folder.

    Args:
        folder: the run's.
        settings: shown as the run's config.
        step: unused; the steps are logged as values, because wandb's own counter cannot go back to a checkpoint.
    """

    def __init__(self, folder: RunFolder, settings: dict[str, Any], step: int) -> None:
        import wandb

        self._wandb, self._folder = wandb, folder
        own = {name: value for name, value in WANDB_SETTINGS.items() if name in wandb.Settings.model_fields}
        self._run = wandb.init(
            project="subjectbooth",
            name=folder.path.name,
            id=folder.key[:16],
            resume="allow",
            config=settings,
            dir=str(folder.path),
            settings=wandb.Settings(**own),
        )
        self._run.define_metric("*", step_metric="step")

    def log_scalars(self, values: Scalars, step: int) -> None:
        self._run.log({"step": step, **values})

    def log_images(self, event: Validation) -> None:
        paths = self._folder.validation_paths(event.step, len(event.prompts))
        drawn = [
            self._wandb.Image(str(path), caption=prompt) for prompt, path in zip(event.prompts, paths, strict=True)
        ]
        self._run.log({"step": event.step, "validation": drawn})

    def close(self) -> None:
        self._run.finish()


BACKENDS: dict[str, Callable[[RunFolder, dict[str, Any], int], Backend]] = {"tensorboard": TensorBoard, "wandb": WandB}
"""By name, which is the package's too."""

TRACKERS = ("none", *BACKENDS)


class Tracker:
    """Follows the events of one run.

    Args:
        name: one of TRACKERS.
        folder: the run's.
        config: its settings.
        say: takes a sentence for the user.
    """

    def __init__(self, name: str, folder: RunFolder, config: TrainConfig, say: Callable[[str], None]) -> None:
        self._folder, self._config, self._say = folder, config, say
        self._name = name
        self._is_active = name in BACKENDS
        self._backend: Backend | None = None

    def follow(self, event: Event) -> None:
        """Show it. The tracker opens when training starts: a run that is found again leaves no trace there."""
        if self._is_active and isinstance(event, Started) and importlib.util.find_spec(self._name) is None:
            self._give_up(f"the package {self._name} is not installed")
        if not self._is_active:
            return
        try:
            self._follow(event)
        except Exception as error:  # a service may fail in any way, and training is not its business
            self._give_up(f"{type(error).__name__}: {error}")

    def close(self) -> None:
        """Flush and end it, however the run ended."""
        backend, self._backend = self._backend, None
        if backend is not None:
            try:
                backend.close()
            except Exception as error:
                self._give_up(f"{type(error).__name__}: {error}", what_next="the run was not touched by it")

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

    def _give_up(self, why: str, what_next: str = "training goes on") -> None:
        self._is_active, self._backend = False, None
        self._say(f"this run is not shown in {self._name} any further ({why}); {what_next}")
