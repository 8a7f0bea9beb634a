"""What a run shows of itself between steps: scores and validation images. Neither affects the training."""

from __future__ import annotations

from collections.abc import Collection, Generator, Iterator

import torch

from ..base.base_model import BaseModel
from ..base.conditioning import concatenate
from ..config import TrainConfig
from ..events import Adjusted, Event, Scores, Validation, ValidationStep
from ..machine.numerics import DTYPES
from ..machine.out_of_memory import free_memory, is_out_of_memory
from ..memory.drawing import Drawing, draw_all, pictures_at_once
from ..memory.plan import FreeMemory
from .assembly import Assembly
from .data import TrainingData
from .probe import Probe

VALIDATION_SEED = 1234
"""Fixed, so that validation images of different steps and runs can be compared."""


class Viewer:
    """Scores and draws with the weights to save, the average if there is one; what does not fit in memory is skipped.

    Args:
        base, data, config: of the training.
        shown: the prompts of the validation images.
        scored: the steps that have scores already, when resuming.
        free: bytes free on a device.
    """

    def __init__(
        self,
        base: BaseModel,
        data: TrainingData,
        config: TrainConfig,
        shown: tuple[str, ...],
        scored: Collection[int],
        free: FreeMemory,
    ) -> None:
        self._base, self._data, self._config = base, data, config
        self._shown, self._scored, self._free = shown, set(scored), free
        self._probe: Probe | None = None

    def close(self) -> None:
        """Release the model."""
        self._probe = None

    def score(self, state: Assembly, step: int) -> Iterator[Event]:
        """Score the current weights, and before the first of them the base, as step 0: not before the first training
        step, which would come later by the time of twenty forward passes."""
        for number in (0, step):
            if self._data.probe is not None and number not in self._scored:
                self._scored.add(number)
                yield from self._score(state, number)

    def _score(self, state: Assembly, step: int) -> Iterator[Event]:
        scores: dict[str, float] | None = None
        try:
            if self._probe is None:
                self._probe = Probe(self._base.denoiser, self._data, state, self._config.snr_gamma)
            with state.averaged():
                scores = self._probe.scores(with_adapter=step > 0)
        except Exception as error:
            if not is_out_of_memory(error):
                raise
        # Outside the handler, in which the exception keeps the failed attempt's tensors alive.
        if scores is None:
            free_memory(state.device)
            note = f"not enough memory for the scores of step {step}: skipped"
            yield Adjusted(step, note, state.chosen.as_settings())
        else:
            yield Scores(step, scores)

    def validate(self, state: Assembly, step: int) -> Iterator[Event]:
        """Sample the validation images."""
        try:
            with state.averaged():
                yield from self._draw(state, step)
        except Exception as error:
            if not is_out_of_memory(error):
                raise
            yield Adjusted(step, "not enough memory for validation images: skipped", state.chosen.as_settings())

    def _draw(self, state: Assembly, step: int) -> Iterator[Event]:
        config, prompts = self._config, self._shown
        encode = state.encode_to_draw if state.trains_text else self._data.encode
        encoded, negative = [encode([prompt]) for prompt in prompts], encode([""])
        longest = concatenate([*encoded, negative]).first
        denoiser, size = self._base.denoiser, self._data.square
        guidance_scale = config.guidance_scale(denoiser.guidance_scale)
        free = self._free(state.device)
        dtype = DTYPES[state.chosen.precision]
        at_once = pictures_at_once(denoiser, state.network, longest, size, dtype, len(prompts), state.device, free)

        def draw(first: int, last: int) -> Generator[int, None, torch.Tensor]:
            seeds = [VALIDATION_SEED + number for number in range(first, last)]
            return denoiser.sample(
                state.network,
                concatenate(encoded[first:last]),
                negative,
                size,
                config.validation_steps,
                guidance_scale,
                seeds,
                state.device,
            )

        drawing = Drawing(draw_all(draw, len(prompts), at_once, config.validation_steps, state.device))
        for done in drawing:
            yield ValidationStep(step, done, config.validation_steps * len(prompts))
        images = self._base.codec.decode(drawing.latents)
        yield Validation(
            step,
            prompts,
            images.permute(0, 2, 3, 1).contiguous(),
            config.validation_steps,
            guidance_scale,
        )
