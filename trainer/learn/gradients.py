"""One step's gradients: its batches in the parts that memory allows, and those side by side where that is faster."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import replace
from functools import partial

import torch

from ..base.base_model import BaseModel
from ..config import TrainConfig
from ..errors import SubjectBoothError
from ..machine.numerics import seeded
from .assembly import Assembly
from .data import TrainingData, derived_seed, make_batches
from .loss import Batch, batch_losses
from .side_by_side import SideBySide, threads_for

Sums = tuple[float, float, float]
"""Loss, instance loss and prior loss."""
Forward = Callable[[], tuple[torch.Tensor, Sums]]


class Gradients:
    """Of one run's steps.

    Attributes:
        labels: what the pictures of the last step are called in messages.
    """

    def __init__(
        self,
        base: BaseModel,
        data: TrainingData,
        config: TrainConfig,
        made: Assembly,
        pictures: int,
    ) -> None:
        self._base, self._data, self._config, self._made = base, data, config, made
        self.labels: list[str] = []
        threads = threads_for(min(self._at_once, pictures), made.chosen, config.lora_dropout)
        # Between processes accelerate adds gradients up, and it scales losses: both inside its own backward().
        plain = made.accelerator.num_processes == 1 and made.accelerator.scaler is None
        self._threads = SideBySide(threads) if threads > 1 and plain else None

    def close(self) -> None:
        """End the threads, if there are any."""
        if self._threads is not None:
            self._threads.close()

    @property
    def _at_once(self) -> int:
        return int(self._made.chosen["pictures_per_forward"])

    def of(self, step: int) -> Sums:
        """Leave the gradients of *step* in the parameters; returns loss, instance loss and prior loss.

        Raises:
            SubjectBoothError: a loss is not finite.
        """
        config, made = self._config, self._made
        accumulate = config.gradient_accumulation_steps
        made.optimizer.zero_grad()
        if step >= config.steps_that_train_text:
            made.freeze_text()
        self.labels = []
        sums = [0.0, 0.0, 0.0]
        for micro_step in range(step * accumulate, (step + 1) * accumulate):
            sizes = make_batches(
                self._data,
                config,
                len(self._base.noise_scheduler.alphas_cumprod),
                micro_step,
                made.device,
                made.accelerator.process_index,
                made.accelerator.num_processes,
            )
            photos = sum(batch.instances for batch in sizes)
            totals = photos, sum(len(batch.latents) for batch in sizes) - photos
            at_once = min(self._at_once, sum(totals))
            threads = min(self._threads.threads, at_once) if self._threads else 1
            parts = [part for same_size in sizes for part in same_size.split(-(-at_once // threads))]
            self.labels += [label for part in parts for label in part.labels]
            forwards = [
                partial(self._forward, step, micro_step, number, part, totals) for number, part in enumerate(parts)
            ]
            for losses in self._one_by_one(forwards) if threads == 1 else self._side_by_side(forwards, threads):
                sums = [total + loss for total, loss in zip(sums, losses, strict=True)]
        return sums[0], sums[1], sums[2]

    def _one_by_one(self, forwards: Sequence[Forward]) -> Iterator[Sums]:
        for forward in forwards:
            loss, sums = forward()
            self._made.accelerator.backward(loss)
            yield sums

    def _side_by_side(self, forwards: Sequence[Forward], threads: int) -> Iterator[Sums]:
        """As many parts at a time as there are threads. Gradients are added in the parts' order, not as they come."""
        assert self._threads is not None
        parameters = self._made.parameters

        def gradients_of(forward: Forward) -> tuple[Sums, tuple[torch.Tensor | None, ...]]:
            loss, sums = forward()
            return sums, torch.autograd.grad(loss, parameters, allow_unused=True)

        for first in range(0, len(forwards), threads):
            now = [partial(gradients_of, forward) for forward in forwards[first : first + threads]]
            for sums, gradients in self._threads.run(now):
                for parameter, gradient in zip(parameters, gradients, strict=True):
                    if gradient is not None:
                        parameter.grad = gradient if parameter.grad is None else parameter.grad + gradient
                yield sums

    def _forward(
        self,
        step: int,
        micro_step: int,
        number: int,
        batch: Batch,
        totals: tuple[int, int],
    ) -> tuple[torch.Tensor, Sums]:
        """A part's loss to go backward from, and what it adds to the step's losses."""
        config, made = self._config, self._made
        accumulate = config.gradient_accumulation_steps
        with torch.enable_grad(), self._dropout_seed(micro_step, number):
            if made.trains_text:
                batch = replace(batch, conditioning=made.encode(batch.prompts))
            losses = batch_losses(
                made.unet, self._base.noise_scheduler, batch, config.prior_loss_weight, config.snr_gamma, totals
            )
            _stop_if_not_finite(batch, losses.each, step)
            prior = float(losses.prior) / accumulate if losses.prior is not None else 0.0
            sums = float(losses.total.detach()) / accumulate, float(losses.instance) / accumulate, prior
            return losses.total / accumulate, sums

    def _dropout_seed(self, micro_step: int, part: int) -> AbstractContextManager[None]:
        """The LoRA's dropout draws from the process's random state: seed it, and put it back as it was."""
        if not self._config.lora_dropout:
            return nullcontext()
        return seeded(derived_seed(self._config.seed, f"dropout {part}", micro_step), self._made.device)


def _stop_if_not_finite(batch: Batch, each: torch.Tensor, step: int) -> None:
    finite = torch.isfinite(each)
    if bool(finite.all()):
        return
    wrong = (~finite).nonzero().flatten().tolist()
    whose = " and ".join(batch.labels[index] for index in wrong)
    raise SubjectBoothError(
        f"a loss of {float(each[wrong[0]]):g} at step {step + 1}, on {whose}",
        "finite numbers",
        f"lower the learning rate, or set precision to bf16 or fp32; the adapter of step {step} is kept",
        "training",
    )
