"""The training loop: build, step, look, and stop where the reader of the events stops.

``events()`` is a generator. It calls no user interface and writes no file; closing it cancels the run, and
:meth:`Training.snapshot` gives everything a resume needs, between two events as well as after an error.
"""

from __future__ import annotations

import time
from collections import deque
from collections.abc import Generator, Iterator
from contextlib import ExitStack
from types import TracebackType

import torch

from ..base.base_model import BaseModel
from ..base.conditioning import concatenate
from ..base.sd.sample import sample
from ..config import TrainConfig
from ..errors import SubjectBoothError, require
from ..events import Adjusted, Event, Started, StepDone, Validation, ValidationStep
from ..machine.numerics import DTYPES, own_numerics, with_own_numerics
from ..machine.out_of_memory import free_bytes, free_memory, is_out_of_memory, memory_errors
from ..memory.drawing import draw_all, pictures_at_once
from ..memory.plan import FreeMemory, Plan
from ..memory.step_down import step_down
from .assembly import Assembly
from .checkpoint import Checkpoint
from .data import TrainingData, largest_load
from .gradients import Gradients
from .optimizers import usable_optimizer

VALIDATION_SEED = 1234
"""Every validation picture of every run starts from this noise, so that steps (and runs) can be compared."""


class Training:
    """One run over one base, as a context manager: leaving it frees the model, however the run ended.

    Args:
        base: what is trained on.
        data: photos, class images and prompts, encoded.
        config: the requested settings.
        shown: the prompts of the validation pictures.
        resume: where to go on; None starts from step 0.
        device: where to train; None lets accelerate choose (under ``accelerate launch`` each process gets its own).
        free: bytes free on a device, for the plan; None asks torch and the system.

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
    ) -> None:
        require("torch", "diffusers", "peft", "accelerate")
        self._base, self._data, self._config = base, data, config
        self._shown, self._resume, self._device, self._free = shown, resume, device, free
        self._assembly: Assembly | None = None
        self.step = resume.step if resume else 0
        self.losses: list[list[float | None]] = list(resume.losses) if resume else []
        self._learning = False  # between two states, neither of which is to be kept

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

    @property
    def is_built(self) -> bool:
        """Whether there is a whole state to take a snapshot of."""
        return self._assembly is not None and not self._learning

    @property
    def chosen(self) -> dict[str, str]:
        """What every ``auto`` setting is by now."""
        assert self._assembly is not None
        return dict(self._assembly.chosen)

    def plan(self) -> Plan:
        """Build, count, and train nothing."""
        with own_numerics():
            return self._build().plan

    def snapshot(self) -> Checkpoint:
        """The run as it is now, copied to the CPU."""
        assert self._assembly is not None
        with own_numerics():
            return self._assembly.snapshot(self.step, self.losses)

    def lora(self) -> dict[str, torch.Tensor]:
        """The adapter as it is now, with kohya's names."""
        assert self._assembly is not None
        with own_numerics():
            return self._assembly.lora()

    def events(self) -> Iterator[Event]:
        """Train from the current step to the last one.

        Yields:
            :class:`Started`, then a :class:`StepDone` for every step, and :class:`ValidationStep`/:class:`Validation`
            where pictures are due.

        Raises:
            SubjectBoothError: the loss or the gradient is not finite; the adapter still is the last good one.
        """
        with own_numerics():
            made = self._build()
        yield from with_own_numerics(self._steps(made), made.device)

    def _steps(self, made: Assembly) -> Generator[Event, None, None]:
        config = self._config
        trainable = sum(parameter.numel() for parameter in made.parameters)
        yield Started(self.step, config.steps, dict(made.chosen), trainable, made.notes, made.plan.sentence)

        clock = _Clock()
        while self.step < config.steps:
            began = time.perf_counter()
            learning_rate = config.lr_at(self.step)
            for group in made.optimizer.param_groups:
                group["lr"] = group["initial_lr"] * learning_rate / config.learning_rate
            sums, note = self._try_gradients(made)
            if sums is None:
                yield Adjusted(self.step, note, dict(made.chosen))
                continue
            grad_norm = self._clip(made)
            self._stop_if_gradient_is_not_finite(made, grad_norm)
            self._learn(made)
            self.step += 1
            prior = sums[2] if self._data.prior_latents is not None else None
            self.losses.append([sums[0], sums[1], prior])
            seconds = clock.step(time.perf_counter() - began)
            eta = clock.eta(config.steps - self.step, config.validations_after(self.step))
            yield StepDone(self.step, config.steps, sums[0], sums[1], prior, learning_rate, grad_norm, seconds, eta)
            if config.validation_is_due(self.step):
                began = time.perf_counter()
                try:
                    with made.averaged():
                        yield from self._validate(made)
                except Exception as error:
                    if not is_out_of_memory(error):
                        raise
                    yield Adjusted(self.step, "not enough memory for validation pictures: left out", dict(made.chosen))
                clock.validation = time.perf_counter() - began

    def _build(self) -> Assembly:
        data = self._data
        load = largest_load(data, self._config.train_batch_size)
        made = self._assembly = Assembly(self._base, self._config, self._device, self._resume, load, self._free)
        self._leaving.callback(made.close)
        self._gradients = Gradients(self._base, data, self._config, made, load.pictures)
        self._leaving.callback(self._gradients.close)
        self._resume = None  # its tensors are not needed any more
        return made

    def _learn(self, made: Assembly) -> None:
        """The optimizer's step. What fails in the middle of it leaves weights of two steps, which are not kept."""
        self._learning = True
        with memory_errors(
            f"too little memory on {made.device} for the {made.chosen['optimizer']} optimizer",
            "a smaller adapter",
            "close other programs, lower rank or choose adamw8bit; the same run goes on from its last checkpoint",
            "training",
        ):
            made.optimizer.step()
            made.update_average(self.step)
        self._learning = False

    def _try_gradients(self, made: Assembly) -> tuple[tuple[float, float, float] | None, str]:
        """The losses of this step, its gradients being in place; or, out of memory, None and what was changed.

        Nothing has been learned from a failed attempt: its gradients are dropped, and the same step is tried again.

        Raises:
            SubjectBoothError: there is nothing left that would need less memory.
        """
        try:
            return self._gradients.of(self.step), ""
        except Exception as error:
            if not is_out_of_memory(error) or made.accelerator.num_processes > 1:
                raise
        # Outside the handler: while it runs, the error keeps the failed attempt's tensors alive.
        made.optimizer.zero_grad()
        free_memory(made.device)
        parts = 1 if self._data.prior_latents is None else 2
        optimizer = made.chosen["optimizer"]
        eight_bit = usable_optimizer("adamw8bit", made.device)[0] == "adamw8bit"
        note = step_down(made.chosen, parts * self._config.train_batch_size, eight_bit)
        if note is None:
            raise SubjectBoothError(
                f"too little memory on {made.device} for one picture of {self._config.resolution} pixels",
                "a smaller picture or a smaller model",
                f"lower resolution or rank, or close other programs; the adapter of step {self.step} is kept",
                "training",
            )
        made.apply_memory_settings()
        if made.chosen["optimizer"] != optimizer:
            made.use_chosen_optimizer()
        return None, note

    def _clip(self, made: Assembly) -> float:
        limit = self._config.max_grad_norm or float("inf")
        norm = made.accelerator.clip_grad_norm_(made.parameters, limit)
        return float(norm) if norm is not None else float("nan")

    def _stop_if_gradient_is_not_finite(self, made: Assembly, norm: float) -> None:
        if abs(norm) < float("inf"):
            return
        # fp16's loss scaling skips single overflowing steps by itself and lowers its scale, which cannot help for ever.
        if made.accelerator.scaler is not None and made.accelerator.scaler.get_scale() >= 1.0:
            return
        whose = ", ".join(dict.fromkeys(self._gradients.labels))
        raise SubjectBoothError(
            f"a gradient norm of {norm:g} at step {self.step + 1}, on {whose}",
            "finite numbers",
            f"lower the learning rate, or set precision to bf16 or fp32; the adapter of step {self.step} is kept",
            "training",
        )

    def _validate(self, made: Assembly) -> Iterator[Event]:
        config, prompts = self._config, self._shown
        encode = made.encode_to_draw if made.trains_text else self._data.encode
        encoded, negative = [encode([prompt]) for prompt in prompts], encode([""])
        longest = concatenate([*encoded, negative]).first
        at_once = pictures_at_once(
            made.unet,
            longest,
            self._data.square,
            DTYPES[made.chosen["precision"]],
            len(prompts),
            made.device,
            (self._free or free_bytes)(made.device),
        )

        def draw(first: int, last: int) -> Generator[int, None, torch.Tensor]:
            seeds = [VALIDATION_SEED + number for number in range(first, last)]
            return sample(
                made.unet,
                self._base.noise_scheduler,
                concatenate(encoded[first:last]),
                negative,
                self._data.square,
                config.validation_steps,
                config.validation_guidance_scale,
                seeds,
                made.device,
            )

        drawing = draw_all(draw, len(prompts), at_once, config.validation_steps, made.device)
        while True:
            try:
                done = next(drawing)
            except StopIteration as finished:
                latents = finished.value
                break
            yield ValidationStep(self.step, done, config.validation_steps * len(prompts))
        images = self._base.codec.decode(latents)
        yield Validation(
            self.step,
            prompts,
            images.permute(0, 2, 3, 1).contiguous(),
            config.validation_steps,
            config.validation_guidance_scale,
        )


class _Clock:
    """Seconds a step, smoothed over the last steps, and what is left."""

    def __init__(self) -> None:
        self._recent: deque[float] = deque(maxlen=20)
        self._first = True
        self.validation = 0.0

    def step(self, seconds: float) -> float:
        # The first step also warms up the device; it would spoil the estimate.
        if not self._first:
            self._recent.append(seconds)
        self._first = False
        return seconds

    def eta(self, steps: int, validations: int) -> float | None:
        if not self._recent:
            return None
        return steps * sum(self._recent) / len(self._recent) + validations * self.validation
