"""Gradients of a step: in micro-batches that fit in memory, computed in parallel threads where that is faster."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Hashable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import replace
from functools import partial

import torch

from ..base.denoiser import Denoiser
from ..config import TrainConfig
from ..errors import SubjectBoothError
from ..machine.draws import derived_seed
from ..machine.numerics import seeded
from ..preserve.curvature_estimate import CurvatureEstimate
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
        estimate: what class preservation learned about the base; None if nothing.
    """

    def __init__(
        self, denoiser: Denoiser, data: TrainingData, config: TrainConfig, state: Assembly, pictures: int
    ) -> None:
        self._denoiser, self._data, self._config, self._state = denoiser, data, config, state
        self.labels: list[str] = []
        self.estimate: CurvatureEstimate | None = None
        self._kept: dict[Hashable, torch.Tensor] = {}
        threads = threads_for(min(self._micro_batch, pictures), state.chosen, config.lora_dropout)
        # accelerate reduces gradients between processes and scales fp16 losses, both in its own backward().
        self._plain = state.accelerator.num_processes == 1 and state.accelerator.scaler is None
        self._threads = SideBySide(threads) if threads > 1 and self._plain else None

    def close(self) -> None:
        """Stop the threads, if there are any."""
        if self._threads is not None:
            self._threads.close()

    @property
    def _micro_batch(self) -> int:
        return self._state.chosen.micro_batch

    def compute(self, step: int) -> dict[str, float]:
        """Accumulate the gradients of a step in the parameters, and return its losses.

        A term is averaged over the micro-steps that have it; the total over all of them.

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
        micro_steps: Counter[str] = Counter()
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
                partial(self._forward, step, number, index, self._with_base(part, micro_step.terms), micro_step.terms)
                for index, part in enumerate(parts)
            ]
            names: set[str] = set()
            for losses in self._sequentially(forwards) if threads == 1 else self._in_parallel(forwards, threads):
                _add(sums, losses)
                names |= losses.keys()
            micro_steps.update(names)
        for name, count in micro_steps.items():
            if count < accumulate and name != TOTAL:
                sums[name] *= accumulate / count
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

    def _penalty(self) -> Values:
        """Compute the terms that depend only on the adapter, and accumulate their gradients."""
        layers = [layer for module in self._state.training_modules for layer in adapter.layers_of(module)]
        with torch.enable_grad():
            terms = self._data.preservation.penalty(layers, self._config.prior_loss_weight, self.estimate)
            if not terms:
                return {}
            total = torch.stack(list(terms.values())).sum()
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
        values = torch.stack([total.detach(), *(term.detach() for term in terms.values())]).tolist()
        return dict(zip([TOTAL, *terms], values, strict=True))

    def _dropout_seed(self, micro_step: int, part: int) -> AbstractContextManager[None]:
        """Dropout uses the global random state: seed it inside, and restore it."""
        if not self._config.lora_dropout:
            return nullcontext()
        return seeded(derived_seed(self._config.seed, f"dropout {part}", micro_step), self._state.device)


def _runs(needed: Sequence[bool], keys: Sequence[Hashable]) -> list[tuple[int, int]]:
    """Ranges of images to predict together: adjacent ones without a key, and each one with a key by itself."""
    runs: list[tuple[int, int]] = []
    for row in (row for row, is_needed in enumerate(needed) if is_needed):
        if runs and runs[-1][1] == row and keys[row] is None and keys[row - 1] is None:
            runs[-1] = runs[-1][0], row + 1
        else:
            runs.append((row, row + 1))
    return runs


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
