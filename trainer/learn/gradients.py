"""Gradients of a step: in micro-batches that fit in memory, computed in parallel threads where that is faster."""

from __future__ import annotations

from collections.abc import Callable, Hashable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import replace
from functools import partial

import torch

from ..base.denoiser import Denoiser
from ..config import TrainConfig
from ..machine.draws import derived_seed
from ..machine.numerics import seeded
from ..machine.processes import current
from ..preserve.curvature_estimate import CurvatureEstimate
from . import adapter
from .assembly import Assembly
from .batch import Batch, MicroStep, Term
from .data import TrainingData, make_micro_step
from .loss import batch_losses
from .reduction import reduced
from .resident import Resident
from .side_by_side import SideBySide, threads_for
from .step_losses import TOTAL, PartLosses, StepLosses

Forward = Callable[[], tuple[torch.Tensor, PartLosses]]


class Gradients:
    """Computes the gradients of a run's steps.

    Attributes:
        estimate: what class preservation learned about the base; None if nothing.
    """

    def __init__(
        self, denoiser: Denoiser, data: TrainingData, config: TrainConfig, state: Assembly, pictures: int
    ) -> None:
        self._denoiser, self._data, self._config, self._state = denoiser, data, config, state
        self.estimate: CurvatureEstimate | None = None
        self._kept: dict[Hashable, torch.Tensor] = {}
        self._resident = Resident(data.encoded, state.device)
        self._ahead: dict[int, MicroStep] = {}
        threads = threads_for(min(self._micro_batch, pictures), state.chosen, config.lora_dropout)
        # accelerate scales fp16 losses in its own backward().
        self._plain = state.accelerator.scaler is None
        # Compiled blocks have one set of kernels, for whole batches.
        alone = threads == 1 or not self._plain or state.compiled is not None
        self._threads = None if alone else SideBySide(threads)

    def close(self) -> None:
        """Stop the threads, if there are any."""
        if self._threads is not None:
            self._threads.close()

    @property
    def _micro_batch(self) -> int:
        return self._state.chosen.micro_batch

    def compute(self, step: int) -> StepLosses:
        """Accumulate the gradients of a step in the parameters; its losses stay on the device.

        Each of several processes computes a part of every batch.
        """
        processes, state = current(), self._state
        if processes.count == 1:
            return self._compute(step)
        return reduced(processes, state.parameters, lambda: self._compute(step), tries_again=state.compiled is not None)

    def _compute(self, step: int) -> StepLosses:
        """The part of this process."""
        config, state = self._config, self._state
        accumulate = config.gradient_accumulation_steps
        state.optimizer.zero_grad()
        if step >= config.text_encoder_steps:
            state.freeze_text()
        losses = StepLosses(accumulate)
        for number in range(step * accumulate, (step + 1) * accumulate):
            micro_step = self._ahead.pop(number, None) or self._draw(number)
            micro_batch = min(self._micro_batch, micro_step.pictures)
            threads = min(self._threads.threads, micro_batch) if self._threads else 1
            parts = [part for batch in micro_step.batches for part in batch.split(-(-micro_batch // threads))]
            forwards = [
                partial(self._forward, number, index, self._with_base(part, micro_step.terms), micro_step.terms)
                for index, part in enumerate(parts)
            ]
            with state.compiled.used() if state.compiled else nullcontext():  # also for blocks that run again backwards
                for found in self._sequentially(forwards) if threads == 1 else self._in_parallel(forwards, threads):
                    losses.add(number, found)
        if current().is_main:  # once a step; it does not depend on the images
            losses.penalty = self._penalty()
        return losses

    def draw_ahead(self, step: int) -> None:
        """Draw the first batch of a step, while the device is still busy with the one before."""
        if step < self._config.steps:
            number = step * self._config.gradient_accumulation_steps
            self._ahead = {number: self._draw(number)}

    def _draw(self, micro_step: int) -> MicroStep:
        whole = make_micro_step(
            self._data, self._config, self._denoiser, micro_step, self._state.device, self._resident
        )
        return whole.share(current())

    def _sequentially(self, forwards: Sequence[Forward]) -> Iterator[PartLosses]:
        for forward in forwards:
            loss, found = forward()
            self._state.accelerator.backward(loss)
            yield found

    def _in_parallel(self, forwards: Sequence[Forward], threads: int) -> Iterator[PartLosses]:
        """Run as many parts at a time as there are threads; gradients are always added in the order of the parts."""
        assert self._threads is not None
        parameters = self._state.parameters

        def gradients_of(forward: Forward) -> tuple[PartLosses, tuple[torch.Tensor | None, ...]]:
            loss, found = forward()
            return found, torch.autograd.grad(loss, parameters, allow_unused=True)

        for first in range(0, len(forwards), threads):
            now = [partial(gradients_of, forward) for forward in forwards[first : first + threads]]
            for found, gradients in self._threads.run(now):
                for parameter, gradient in zip(parameters, gradients, strict=True):
                    if gradient is not None:
                        parameter.grad = gradient if parameter.grad is None else parameter.grad + gradient
                yield found

    def _forward(self, number: int, index: int, batch: Batch, terms: Sequence[Term]) -> tuple[torch.Tensor, PartLosses]:
        """What to differentiate for a part of a micro-step, and the part's losses."""
        state = self._state
        with torch.enable_grad(), self._dropout_seed(number, index):
            if state.trains_text:
                batch = replace(batch, conditioning=state.encode(batch.prompts))
            losses = batch_losses(self._denoiser, state.network, batch, terms, self._config.snr_gamma)
            found = PartLosses({TOTAL: losses.total.detach(), **losses.terms}, losses.each, batch.labels)
            accumulate = self._config.gradient_accumulation_steps
            return (losses.total if accumulate == 1 else losses.total / accumulate), found

    def _with_base(self, batch: Batch, terms: Sequence[Term]) -> Batch:
        """Add the base's predictions for the images that need one, computed with the frozen text encoder's prompts."""
        compared = {term.name for term in terms if term.photo_loss is not None}
        count = len(batch.losses)
        needed = [
            bool(from_base) or loss in compared
            for from_base, loss in zip(batch.from_base or [False] * count, batch.losses, strict=True)
        ]
        if not any(needed):
            return batch
        keys = batch.keys or (None,) * count
        base = torch.zeros_like(batch.latents)
        with torch.no_grad(), adapter.switched_off(self._state.modules):
            for first, last in _runs(needed, keys):
                part, key = batch.rows(first, last), keys[first]
                if key is None:
                    base[first:last] = self._predict(part)
                    continue
                if key not in self._kept:
                    # By itself and with its own prompt's length: together with others it would depend on them by
                    # rounding, and so on the step at which a run was resumed.
                    prompt = self._data.encode(part.prompts).to(base.device)
                    self._kept[key] = self._predict(replace(part, conditioning=prompt)).cpu()
                base[first:last] = self._kept[key].to(base.device)
        return replace(batch, base=base)

    def _predict(self, batch: Batch) -> torch.Tensor:
        noisy_latents = self._denoiser.noisy_latents(batch.latents, batch.noise, batch.times)
        return self._denoiser.predict(self._state.network, noisy_latents, batch.times, batch.conditioning)

    def _penalty(self) -> Mapping[str, torch.Tensor]:
        """Compute the terms that depend only on the adapter, and accumulate their gradients."""
        layers = [layer for module in self._state.training_modules for layer in adapter.layers_of(module)]
        with torch.enable_grad():
            terms = self._data.preservation.penalty(layers, self._config.prior_loss_weight, self.estimate)
            if not terms:
                return {}
            values = list(terms.values())
            total = values[0] if len(values) == 1 else torch.stack(values).sum()
        if self._plain:
            # Added in a few kernels: autograd would add each of hundreds of small gradients by itself.
            parameters = [parameter for layer in layers for parameter in (layer.down, layer.up)]
            found = torch.autograd.grad(total, parameters, allow_unused=True)
            pairs = [pair for pair in zip(parameters, found, strict=True) if pair[1] is not None]
            both = [(parameter.grad, gradient) for parameter, gradient in pairs if parameter.grad is not None]
            if both:
                torch._foreach_add_(*map(list, zip(*both, strict=True)))
            for parameter, gradient in pairs:
                if parameter.grad is None:
                    parameter.grad = gradient
        else:
            self._state.accelerator.backward(total)
        return {name: term.detach() for name, term in {TOTAL: total, **terms}.items()}

    def _dropout_seed(self, micro_step: int, part: int) -> AbstractContextManager[None]:
        """Dropout uses the global random state: seed it inside, and restore it."""
        if not self._config.lora_dropout:
            return nullcontext()
        rank = current().rank
        whose = f"dropout {part}" if rank == 0 else f"dropout {part} of process {rank}"
        return seeded(derived_seed(self._config.seed, whose, micro_step), self._state.device)


def _runs(needed: Sequence[bool], keys: Sequence[Hashable]) -> list[tuple[int, int]]:
    """Ranges of images to predict together: adjacent ones without a key, and each one with a key by itself."""
    runs: list[tuple[int, int]] = []
    for row in (row for row, is_needed in enumerate(needed) if is_needed):
        if runs and runs[-1][1] == row and keys[row] is None and keys[row - 1] is None:
            runs[-1] = runs[-1][0], row + 1
        else:
            runs.append((row, row + 1))
    return runs
