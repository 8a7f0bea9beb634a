"""Gradients of a step: in micro-batches that fit in memory, computed in parallel threads where that is faster."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import replace
from functools import partial

import torch

from ..base.denoiser import Denoiser
from ..config import TrainConfig
from ..errors import SubjectBoothError
from ..machine.draws import derived_seed
from ..machine.numerics import seeded
from . import adapter
from .assembly import Assembly
from .batch import Batch, Term
from .data import TrainingData, make_micro_step
from .loss import batch_losses
from .side_by_side import SideBySide, threads_for

TOTAL = "loss"

Values = Mapping[str, float]
"""The terms of the loss by name, and their weighted sum under :data:`TOTAL`."""
Forward = Callable[[], tuple[torch.Tensor, Values]]


class Gradients:
    """Computes the gradients of a run's steps.

    Attributes:
        labels: names of the last step's images, for messages.
    """

    def __init__(
        self, denoiser: Denoiser, data: TrainingData, config: TrainConfig, state: Assembly, pictures: int
    ) -> None:
        self._denoiser, self._data, self._config, self._state = denoiser, data, config, state
        self.labels: list[str] = []
        threads = threads_for(min(self._micro_batch, pictures), state.chosen, config.lora_dropout)
        # accelerate reduces gradients between processes and scales fp16 losses, both in its own backward().
        plain = state.accelerator.num_processes == 1 and state.accelerator.scaler is None
        self._threads = SideBySide(threads) if threads > 1 and plain else None

    def close(self) -> None:
        """Stop the threads, if there are any."""
        if self._threads is not None:
            self._threads.close()

    @property
    def _micro_batch(self) -> int:
        return self._state.chosen.micro_batch

    def compute(self, step: int) -> dict[str, float]:
        """Accumulate the gradients of a step in the parameters, and return its losses.

        Raises:
            SubjectBoothError: a loss is not finite.
        """
        config, state = self._config, self._state
        accumulate = config.gradient_accumulation_steps
        state.optimizer.zero_grad()
        if step >= config.text_encoder_steps:
            state.freeze_text()
        self.labels = []
        sums: dict[str, float] = {}
        for number in range(step * accumulate, (step + 1) * accumulate):
            micro_step = make_micro_step(
                self._data,
                config,
                self._denoiser,
                number,
                state.device,
                state.accelerator.process_index,
                state.accelerator.num_processes,
            )
            micro_batch = min(self._micro_batch, micro_step.pictures)
            threads = min(self._threads.threads, micro_batch) if self._threads else 1
            parts = [part for batch in micro_step.batches for part in batch.split(-(-micro_batch // threads))]
            self.labels += [label for part in parts for label in part.labels]
            forwards = [
                partial(self._forward, step, number, index, self._with_targets(part), micro_step.terms)
                for index, part in enumerate(parts)
            ]
            for losses in self._sequentially(forwards) if threads == 1 else self._in_parallel(forwards, threads):
                _add(sums, losses)
        _add(sums, self._penalty())
        return sums

    def _sequentially(self, forwards: Sequence[Forward]) -> Iterator[Values]:
        for forward in forwards:
            loss, values = forward()
            self._state.accelerator.backward(loss)
            yield values

    def _in_parallel(self, forwards: Sequence[Forward], threads: int) -> Iterator[Values]:
        """Run as many parts at a time as there are threads; gradients are always added in the order of the parts."""
        assert self._threads is not None
        parameters = self._state.parameters

        def gradients_of(forward: Forward) -> tuple[Values, tuple[torch.Tensor | None, ...]]:
            loss, values = forward()
            return values, torch.autograd.grad(loss, parameters, allow_unused=True)

        for first in range(0, len(forwards), threads):
            now = [partial(gradients_of, forward) for forward in forwards[first : first + threads]]
            for values, gradients in self._threads.run(now):
                for parameter, gradient in zip(parameters, gradients, strict=True):
                    if gradient is not None:
                        parameter.grad = gradient if parameter.grad is None else parameter.grad + gradient
                yield values

    def _forward(
        self, step: int, number: int, index: int, batch: Batch, terms: Sequence[Term]
    ) -> tuple[torch.Tensor, Values]:
        """A part's loss, and its contribution to the step's losses."""
        state, accumulate = self._state, self._config.gradient_accumulation_steps
        with torch.enable_grad(), self._dropout_seed(number, index):
            if state.trains_text:
                batch = replace(batch, conditioning=state.encode(batch.prompts))
            losses = batch_losses(self._denoiser, state.network, batch, terms, self._config.snr_gamma)
            names = [TOTAL, *losses.terms]
            scalars = torch.stack([losses.total.detach(), *losses.terms.values()])
            values = torch.cat([scalars, losses.each]).cpu().tolist()  # one transfer, as it waits for the GPU
            _stop_if_not_finite(batch, values[len(names) :], step)
            found = {name: value / accumulate for name, value in zip(names, values, strict=False)}
            return losses.total / accumulate, found

    def _with_targets(self, batch: Batch) -> Batch:
        """Add the base's predictions, if they are targets of the batch."""
        if not any(batch.from_base):
            return batch
        state, denoiser = self._state, self._denoiser
        with torch.no_grad(), adapter.switched_off(state.modules):
            noisy_latents = denoiser.noisy_latents(batch.latents, batch.noise, batch.times)
            targets = denoiser.predict(state.network, noisy_latents, batch.times, batch.conditioning)
        return replace(batch, targets=targets)

    def _penalty(self) -> Values:
        """Compute the terms that depend only on the adapter, and accumulate their gradients."""
        layers = (layer for module in self._state.modules.values() for layer in adapter.layers_of(module))
        with torch.enable_grad():
            terms = self._data.preservation.penalty(layers, self._config.prior_loss_weight)
            if not terms:
                return {}
            total = torch.stack(list(terms.values())).sum()
        self._state.accelerator.backward(total)
        return {TOTAL: float(total.detach())} | {name: float(term.detach()) for name, term in terms.items()}

    def _dropout_seed(self, micro_step: int, part: int) -> AbstractContextManager[None]:
        """Dropout uses the global random state: seed it inside, and restore it."""
        if not self._config.lora_dropout:
            return nullcontext()
        return seeded(derived_seed(self._config.seed, f"dropout {part}", micro_step), self._state.device)


def _add(sums: dict[str, float], values: Values) -> None:
    for name, value in values.items():
        sums[name] = sums.get(name, 0.0) + value


def _stop_if_not_finite(batch: Batch, each: Sequence[float], step: int) -> None:
    wrong = [index for index, loss in enumerate(each) if not abs(loss) < float("inf")]
    if not wrong:
        return
    whose = " and ".join(batch.labels[index] for index in wrong)
    raise SubjectBoothError(
        f"a loss of {each[wrong[0]]:g} at step {step + 1}, on {whose}",
        "finite numbers",
        f"lower the learning rate, or set precision to bf16 or fp32; the adapter of step {step} is kept",
    )
