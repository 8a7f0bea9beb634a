"""The training loop: build, step, look, and stop where the reader of the events stops.

``events()`` is a generator. It calls no user interface and writes no file; closing it cancels the run, and
:meth:`Training.snapshot` gives everything a resume needs, between two events as well as after an error.
"""

from __future__ import annotations

import logging
import time
from collections import deque
from collections.abc import Iterator
from contextlib import AbstractContextManager, ExitStack, contextmanager, nullcontext
from types import TracebackType
from typing import TYPE_CHECKING, Any

import torch

from . import adapter
from .base_model import BaseModel
from .checkpoint import Checkpoint
from .conditioning import Conditioning
from .config import TrainConfig
from .data import TrainingData, derived_seed, make_batch
from .ema import AdapterAverage
from .errors import SubjectBoothError, require
from .events import Event, Started, StepDone, Validation, ValidationStep
from .loss import batch_losses
from .optimizers import make_optimizer
from .runtime import DTYPES, accelerate_precision, choose, isolated_accelerate
from .sample import sample

if TYPE_CHECKING:
    from accelerate import Accelerator
    from diffusers import UNet2DConditionModel

logger = logging.getLogger("subjectbooth")

VALIDATION_SEED = 1234
"""Every validation picture of every run starts from this noise, so that steps (and runs) can be compared."""


class Training:
    """One run over one base, as a context manager: leaving it frees the model, however the run ended.

    Args:
        base: what is trained on.
        data: photos and class images, encoded.
        config: the requested settings.
        validation: ``(prompt, conditioning)`` of each validation picture.
        negative: conditioning of the empty prompt, for guidance.
        resume: where to go on; None starts from step 0.
        device: where to train; None lets accelerate choose (under ``accelerate launch`` each process gets its own).

    Raises:
        SubjectBoothError: a package is missing, or a setting does not fit the base.
    """

    def __init__(
        self, base: BaseModel, data: TrainingData, config: TrainConfig, *,
        validation: tuple[tuple[str, Conditioning], ...] = (), negative: Conditioning | None = None,
        resume: Checkpoint | None = None, device: torch.device | None = None,
    ) -> None:
        require("diffusers", "peft", "accelerate")
        self._base, self._data, self._config = base, data, config
        self._validation, self._negative, self._device = validation, negative, device
        self._resume = resume
        self._unet: UNet2DConditionModel | None = None
        self._optimizer: torch.optim.Optimizer | None = None
        self._accelerator: Accelerator | None = None
        self._average: AdapterAverage | None = None
        self.step = resume.step if resume else 0
        self.losses: list[list[float | None]] = list(resume.losses) if resume else []
        self.chosen: dict[str, str] = dict(resume.chosen) if resume else {}

    def __enter__(self) -> Training:
        self._leaving = ExitStack()
        self._leaving.enter_context(isolated_accelerate())
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None,
    ) -> None:
        if self._accelerator is not None:
            self._accelerator.free_memory()
        self._unet = self._optimizer = self._accelerator = self._average = None
        self._leaving.close()

    @property
    def is_built(self) -> bool:
        """Whether there is a model to take a snapshot of."""
        return self._optimizer is not None

    def snapshot(self) -> Checkpoint:
        """The run as it is now, copied to the CPU."""
        assert self._unet is not None and self._optimizer is not None and self._accelerator is not None
        optimizer: dict[int, dict[str, Any]] = {
            index: {name: value.detach().cpu().clone() if isinstance(value, torch.Tensor) else value
                    for name, value in entries.items()}
            for index, entries in self._optimizer.state_dict()["state"].items()}
        scaler = self._accelerator.scaler.state_dict() if self._accelerator.scaler else {}
        average = [tensor.cpu().clone() for tensor in self._average.average] if self._average else []
        return Checkpoint(self.step, adapter.adapter_state(self._unet), optimizer, list(self.losses), self.chosen,
                          _plain_groups(self._optimizer), average, scaler)

    def lora(self) -> dict[str, torch.Tensor]:
        """The adapter as it is now, with kohya's names."""
        assert self._unet is not None
        with self._average.applied() if self._average else nullcontext():
            state = adapter.adapter_state(self._unet)
        return adapter.to_kohya(state, "lora_unet", adapter.file_alpha(self._config), self._base.layer_names)

    def events(self) -> Iterator[Event]:
        """Train from the current step to the last one.

        Yields:
            :class:`Started`, then a :class:`StepDone` for every step, and :class:`ValidationStep`/:class:`Validation`
            where pictures are due.

        Raises:
            SubjectBoothError: the loss or the gradient is not finite; the adapter still is the last good one.
        """
        config = self._config
        device, parameters, model, optimizer = self._set_up()
        trainable = sum(parameter.numel() for parameter in parameters)
        yield Started(self.step, config.steps, self.chosen, trainable, self._notes)

        accelerator = self._accelerator
        assert accelerator is not None
        clock = _Clock()
        while self.step < config.steps:
            began = time.perf_counter()
            learning_rate = config.lr_at(self.step)
            for group in optimizer.param_groups:
                group["lr"] = learning_rate
            optimizer.zero_grad()
            sums = [0.0, 0.0, 0.0]
            accumulate = config.gradient_accumulation_steps
            for micro_step in range(self.step * accumulate, (self.step + 1) * accumulate):
                batch = make_batch(
                    self._data, config, len(self._base.noise_scheduler.alphas_cumprod), micro_step, device,
                    accelerator.process_index, accelerator.num_processes)
                with torch.enable_grad(), self._dropout_seed(micro_step, device):
                    losses = batch_losses(
                        model, self._base.noise_scheduler, batch, config.prior_loss_weight, config.snr_gamma)
                    accelerator.backward(losses.total / accumulate)
                found = (losses.total.detach(), losses.instance, losses.prior)
                sums = [total + float(part) / accumulate if part is not None else total
                        for total, part in zip(sums, found, strict=True)]
            grad_norm = self._clip(parameters)
            self._stop_if_not_finite(sums[0], grad_norm)
            optimizer.step()
            if self._average:
                self._average.update()
            self.step += 1
            prior = sums[2] if self._data.prior_latents is not None else None
            self.losses.append([sums[0], sums[1], prior])
            seconds = clock.step(time.perf_counter() - began)
            eta = clock.eta(config.steps - self.step, config.validations_after(self.step))
            yield StepDone(self.step, config.steps, sums[0], sums[1], prior, learning_rate, grad_norm, seconds, eta)
            if config.validation_is_due(self.step):
                began = time.perf_counter()
                with self._average.applied() if self._average else nullcontext():
                    yield from self._validate(model, device)
                clock.validation = time.perf_counter() - began

    def _set_up(self) -> tuple[torch.device, list[torch.nn.Parameter], Any, torch.optim.Optimizer]:
        from accelerate import Accelerator
        from accelerate.state import PartialState

        device = self._device or PartialState().device
        found, self._notes = choose(self._config, device)
        # A resumed run keeps what was chosen at its start: another precision would give other weights.
        self.chosen = {**found, **self.chosen, "device": found["device"]}
        precision = self.chosen["precision"]
        self._accelerator = Accelerator(
            mixed_precision=accelerate_precision(precision), cpu=device.type == "cpu", device_placement=False)
        unet = self._unet = self._base.build_unet(DTYPES[precision])
        parameters = adapter.inject(unet, self._config)
        unet.to(device)
        if self._resume:
            adapter.load_adapter_state(unet, self._resume.adapter)
        if self.chosen["gradient_checkpointing"] == "on":
            unet.enable_gradient_checkpointing()
        unet.train()  # diffusers checkpoints activations in train mode only; the base has no dropout of its own
        optimizer, notes = make_optimizer(parameters, self._config, device)
        self._notes += notes
        self._average = AdapterAverage(parameters, self._config.ema_decay) if self._config.ema_decay else None
        if self._resume:
            groups = [{**group, **saved} for group, saved in zip(
                optimizer.state_dict()["param_groups"], self._resume.groups, strict=True)]
            optimizer.load_state_dict({"state": self._resume.optimizer, "param_groups": groups})
            if self._average:
                self._average.average = [tensor.to(device) for tensor in self._resume.average]
        self._optimizer = optimizer
        model, prepared = self._accelerator.prepare(unet, optimizer)
        if self._resume and self._resume.scaler and self._accelerator.scaler:
            self._accelerator.scaler.load_state_dict(self._resume.scaler)
        self._resume = None  # its tensors are not needed any more
        return device, parameters, model, prepared

    def _dropout_seed(self, micro_step: int, device: torch.device) -> AbstractContextManager[None]:
        """The LoRA's dropout draws from the process's random state: seed it, and put it back as it was."""
        if not self._config.lora_dropout:
            return nullcontext()
        return _seeded(derived_seed(self._config.seed, "dropout", micro_step), device)

    def _clip(self, parameters: list[torch.nn.Parameter]) -> float:
        assert self._accelerator is not None
        limit = self._config.max_grad_norm or float("inf")
        norm = self._accelerator.clip_grad_norm_(parameters, limit)
        return float(norm) if norm is not None else float("nan")

    def _stop_if_not_finite(self, loss: float, grad_norm: float) -> None:
        # fp16's loss scaling skips single overflowing steps by itself, so there only the loss counts.
        scaled = self._accelerator is not None and self._accelerator.scaler is not None
        values = (loss,) if scaled else (loss, grad_norm)
        if all(abs(value) < float("inf") for value in values):
            return
        raise SubjectBoothError(
            f"a loss of {loss:g} with a gradient norm of {grad_norm:g} at step {self.step + 1}", "finite numbers",
            f"lower the learning rate or use bf16 or fp32; the adapter of step {self.step} is kept", "training")

    def _validate(self, model: Any, device: torch.device) -> Iterator[Event]:
        config, latents = self._config, []
        total = config.validation_steps * len(self._validation)
        assert self._negative is not None
        for number, (_, conditioning) in enumerate(self._validation):
            drawing = sample(
                model, self._base.noise_scheduler, conditioning, self._negative, tuple(self._data.latents.shape[1:]),
                config.validation_steps, config.validation_guidance_scale, VALIDATION_SEED + number, device)
            while True:
                try:
                    done = next(drawing)
                except StopIteration as finished:
                    latents.append(finished.value)
                    break
                yield ValidationStep(self.step, number * config.validation_steps + done, total)
        images = self._base.codec.decode(torch.cat(latents))
        prompts = tuple(prompt for prompt, _ in self._validation)
        yield Validation(self.step, prompts, images.permute(0, 2, 3, 1).contiguous())


@contextmanager
def _seeded(seed: int, device: torch.device) -> Iterator[None]:
    with torch.random.fork_rng(devices=[device] if device.type == "cuda" else []):
        torch.manual_seed(seed)
        yield


def _plain_groups(optimizer: torch.optim.Optimizer) -> list[dict[str, Any]]:
    """What an optimizer keeps beside its tensors, as JSON values."""
    kinds = (int, float, str, list, tuple, type(None))
    return [{name: value for name, value in group.items() if name != "params" and isinstance(value, kinds)}
            for group in optimizer.state_dict()["param_groups"]]


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
