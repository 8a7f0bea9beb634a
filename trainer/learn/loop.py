"""The training loop.

``events()`` is a generator. It calls no user interface and writes no file. Closing it cancels the training;
:meth:`Training.snapshot` returns all state for resuming, between any two events and after an error.
"""

from __future__ import annotations

import copy
import time
from collections.abc import Collection, Generator, Iterator, Mapping, Sequence
from contextlib import ExitStack
from types import TracebackType

import torch
from torch import nn

from ..base.base_model import BaseModel
from ..config import TrainConfig
from ..errors import SubjectBoothError, require
from ..events import Adjusted, Event, Started, StepDone
from ..machine.compilation import why_not
from ..machine.numerics import default_numerics, with_default_numerics
from ..machine.out_of_memory import (
    free_bytes,
    free_memory,
    is_out_of_memory,
    memory_errors,
    return_freed_memory,
)
from ..machine.processes import current
from ..machine.resolved_settings import ResolvedSettings
from ..memory.plan import FreeMemory, Plan
from ..memory.step_down import step_down
from ..preserve.curvature_estimate import CurvatureEstimate
from .assembly import NETWORK, Assembly, RateFactor
from .checkpoint import Checkpoint
from .clock import Clock
from .data import TrainingData, largest_load
from .gradients import Gradients
from .optimizers import usable_optimizer
from .step_losses import TOTAL, StepLosses
from .study import study
from .viewer import Viewer


class Training:
    """The training of one LoRA; a context manager that releases the model on exit.

    Args:
        base: the base to train on.
        data: encoded photos, class images and prompts.
        config: the requested settings.
        shown: the prompts of the validation images.
        resume: the checkpoint to resume from; None starts at step 0.
        device: where to train; None lets accelerate choose (under ``accelerate launch`` one per process).
        free: bytes free on a device; None asks torch and the system.
        rate_factor: of the learning rate for each of the network's adapter weights; None is 1 for all.
        studied: what class preservation learned about the base at the run's start, from :attr:`studied`.
        scored: the steps that have scores already, when resuming.

    Raises:
        SubjectBoothError: a package is missing, or a setting does not fit the base.
    """

    def __init__(
        self,
        base: BaseModel,
        data: TrainingData,
        config: TrainConfig,
        shown: tuple[str, ...] = (),
        resume: Checkpoint | None = None,
        device: torch.device | None = None,
        free: FreeMemory | None = None,
        rate_factor: RateFactor | None = None,
        studied: Mapping[str, torch.Tensor] | None = None,
        scored: Collection[int] = (),
    ) -> None:
        require("torch", "diffusers", "peft", "accelerate")
        self._base, self._data, self._config = base, data, config
        self._resume, self._device, self._free, self._rate_factor = resume, device, free, rate_factor
        self._viewer = Viewer(base, data, config, shown, scored, free or free_bytes)
        self.studied = studied
        self._assembly: Assembly | None = None
        self.step = resume.step if resume else 0
        self.losses: list[dict[str, float]] = list(resume.losses) if resume else []
        self._learning = False  # within an optimizer step, when the state must not be saved

    def __enter__(self) -> Training:
        self._leaving = ExitStack()
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        self._leaving.close()
        self._assembly = None
        self._viewer.close()

    @property
    def is_built(self) -> bool:
        """Whether :meth:`snapshot` can be called."""
        return self._assembly is not None and not self._learning

    @property
    def chosen(self) -> ResolvedSettings:
        """The current values of ``auto`` settings."""
        assert self._assembly is not None
        return self._assembly.chosen

    @property
    def memory_plan(self) -> Plan:
        """The plan of the training that is built."""
        assert self._assembly is not None
        return self._assembly.plan

    def plan(self) -> Plan:
        """Build the model and plan its memory, without training."""
        with default_numerics():
            return self._build().plan

    def snapshot(self) -> Checkpoint:
        """The current state, copied to the CPU."""
        assert self._assembly is not None
        with default_numerics():
            return self._assembly.snapshot(self.step, self.losses)

    def lora(self) -> dict[str, torch.Tensor]:
        """The current LoRA under kohya's keys."""
        assert self._assembly is not None
        with default_numerics():
            return self._assembly.lora()

    def averaged_network(self) -> nn.Module:
        """A copy of the network with the adapter that :meth:`lora` gives, to draw with after the training."""
        assert self._assembly is not None
        with default_numerics(), self._assembly.averaged():
            return copy.deepcopy(self._assembly.modules[NETWORK]).eval()

    def events(self) -> Iterator[Event]:
        """Train from the current step to the last one.

        Yields:
            a :class:`Started`, a :class:`StepDone` after every step, an :class:`Adjusted` when settings are lowered,
            :class:`Scores` of the base and of every kept step if ``data`` has prompts for them, and
            :class:`ValidationStep`/:class:`Validation` when validation images are due.

        Raises:
            SubjectBoothError: the loss or the gradient is not finite, or too little memory; the LoRA is that of the
                last completed step.
        """
        with default_numerics():
            state = self._build()
        yield from with_default_numerics(self._steps(state), state.device)

    def _steps(self, state: Assembly) -> Generator[Event, None, None]:
        config = self._config
        trainable = sum(parameter.numel() for parameter in state.parameters)
        chosen, plan = state.chosen.as_settings(), state.plan
        return_freed_memory()  # of what built the model, and of its parts that are not trained
        yield Started(self.step, config.steps, chosen, trainable, state.notes, plan.sentence, plan.counts)

        if current().is_main:  # what follows only reports, or is known to the main process alone
            yield from self._study(state)
            if self.step and config.step_is_kept(self.step):
                yield from self._viewer.score(state, self.step)
        state.agree()
        clock = Clock()
        while self.step < config.steps:
            began = time.perf_counter()
            learning_rate = config.learning_rate_at(self.step)
            for group in state.optimizer.param_groups:
                group["lr"] = group["initial_lr"] * learning_rate / config.learning_rate
            found, note = self._try_gradients(state)
            if found is None:
                yield Adjusted(self.step, note, state.chosen.as_settings())
                continue
            losses, grad_norm = self._learn(state, found)
            self.step += 1
            self.losses.append(losses)
            seconds = clock.step(time.perf_counter() - began)
            eta = clock.eta(config.steps - self.step, config.validations_left(self.step))
            terms = {name: loss for name, loss in losses.items() if name != TOTAL}
            yield StepDone(self.step, config.steps, losses[TOTAL], terms, learning_rate, grad_norm, seconds, eta)
            if not current().is_main:
                continue
            if config.step_is_kept(self.step):
                yield from self._viewer.score(state, self.step)
            if config.validation_is_due(self.step):
                began = time.perf_counter()
                yield from self._viewer.validate(state, self.step)
                clock.validation = time.perf_counter() - began

    def _build(self) -> Assembly:
        data = self._data
        load = self._load = largest_load(data, self._config.train_batch_size).share(current().count)
        state = self._assembly = Assembly(
            self._base, self._config, self._device, self._resume, load, self._free, self._rate_factor
        )
        self._leaving.callback(state.close)
        self._gradients = Gradients(self._base.denoiser, data, self._config, state, load.pictures)
        self._leaving.callback(self._gradients.close)
        self._resume = None  # release its tensors
        return state

    def _learn(self, state: Assembly, found: StepLosses) -> tuple[dict[str, float], float]:
        """Run the optimizer, and read the step's losses and gradient norm, which is its only wait for the device.

        If the optimizer fails, some weights may be updated and others not, so the state is not saved.

        Raises:
            SubjectBoothError: a loss or the gradient is not finite; nothing has changed then.
        """
        values = found.with_norm(self._clip(state))
        leaves_out = state.leave_out_if_not_finite(values)
        numbers = None if leaves_out else self._finite(state, found, values)
        self._learning = True
        with memory_errors(
            f"too little memory on {state.device} for the {state.chosen.optimizer} optimizer",
            "a smaller adapter",
            "close other programs, lower rank or choose adamw8bit; the run resumes from its last checkpoint",
        ):
            state.optimizer.step()
            self._gradients.draw_ahead(self.step + 1)
            if numbers is None:
                numbers = self._finite(state, found, values)
            state.update_average(self.step)
        self._learning = False
        return numbers

    def _finite(self, state: Assembly, found: StepLosses, values: torch.Tensor) -> tuple[dict[str, float], float]:
        """Read the losses and the gradient norm.

        Raises:
            SubjectBoothError: one of them is not finite.
        """
        numbers = values.to("cpu").tolist()
        try:
            losses, norm = found.read(numbers, self.step)
            self._stop_if_gradient_is_not_finite(state, norm, found.labels)
        except SubjectBoothError:
            self._learning = False  # an optimizer that has run has left the step out
            raise
        return losses, norm

    def _study(self, state: Assembly) -> Iterator[Event]:
        """Study the base, if class preservation needs to and has not; if out of memory, lower settings and repeat."""
        if not self._data.preservation.study_images:
            return
        while self.studied is None:
            try:
                estimate = yield from study(state, self._base.denoiser, self._data, self._config, self.step)
                self.studied = estimate.to_tensors()
                break
            except Exception as error:
                if not is_out_of_memory(error):
                    raise
            yield Adjusted(self.step, self._step_down(state), state.chosen.as_settings())
        self._gradients.estimate = CurvatureEstimate.from_tensors(self.studied, state.device)

    def _try_gradients(self, state: Assembly) -> tuple[StepLosses | None, str]:
        """Compute the gradients and return the losses; if out of memory, lower settings and return None and a note; so
        too if compiled blocks fail, which from then on run as they are.

        A failed attempt has no effect: its gradients are discarded, and the step is tried again.

        Raises:
            SubjectBoothError: no setting is left to lower.
        """
        note = ""
        try:
            return self._gradients.compute(self.step), note
        except Exception as error:
            if not (is_out_of_memory(error) or state.compiled):
                raise
            if not is_out_of_memory(error):
                note = why_not(error)
        # Outside the handler, in which the exception keeps the failed attempt's tensors alive.
        if not note:
            return None, self._step_down(state)
        state.optimizer.zero_grad()
        state.stop_compiling()
        return None, note

    def _step_down(self, state: Assembly) -> str:
        """Lower settings to use less memory; returns a note.

        Raises:
            SubjectBoothError: no setting is left to lower.
        """
        state.optimizer.zero_grad()
        free_memory(state.device)
        eight_bit = usable_optimizer("adamw8bit", state.device)[0] == "adamw8bit"
        less = step_down(state.chosen, self._load.pictures, eight_bit)
        if less is None:
            raise SubjectBoothError(
                f"too little memory on {state.device} for one image of {self._config.resolution} pixels",
                "a smaller image or a smaller model",
                f"lower resolution or rank, or close other programs; the adapter of step {self.step} is kept",
            )
        chosen, note = less
        state.use(chosen)
        return note

    def _clip(self, state: Assembly) -> torch.Tensor:
        limit = self._config.max_grad_norm or float("inf")
        norm = state.accelerator.clip_grad_norm_(state.parameters, limit)
        assert norm is not None
        return norm  # type: ignore[no-any-return]

    def _stop_if_gradient_is_not_finite(self, state: Assembly, norm: float, labels: Sequence[str]) -> None:
        if abs(norm) < float("inf"):
            return
        # fp16 loss scaling skips overflowing steps and lowers its scale; at scales below 1 that no longer helps.
        if state.accelerator.scaler is not None and state.accelerator.scaler.get_scale() >= 1.0:
            return
        whose = ", ".join(dict.fromkeys(labels))
        raise SubjectBoothError(
            f"a gradient norm of {norm:g} at step {self.step + 1}, on {whose}",
            "finite numbers",
            f"lower the learning rate, or set precision to bf16 or fp32; the adapter of step {self.step} is kept",
        )
