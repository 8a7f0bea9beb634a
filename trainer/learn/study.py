"""Studies the base before training: how a change of each layer's weights changes its predictions."""

from __future__ import annotations

from collections.abc import Generator, Iterator
from contextlib import contextmanager
from dataclasses import replace
from typing import Any

import torch

from ..base.denoiser import Denoiser
from ..config import TrainConfig
from ..events import Studying
from ..machine.draws import generator_for
from ..preserve.curvature_estimate import CurvatureEstimate, SecondMomentSketch
from . import adapter
from .assembly import Assembly
from .batch import Batch
from .data import TrainingData, make_micro_step, make_study_batch
from .loss import batch_losses

CALIBRATION_IMAGES = 16
"""Images for which the change of the predictions is measured, and about as many photos for the direction of it."""
CALIBRATION_CHANGE = 1e-3
"""Size of the change that the estimate is calibrated with: its own mean squared change of predictions, before."""


def study(
    state: Assembly, denoiser: Denoiser, data: TrainingData, config: TrainConfig, step: int
) -> Generator[Studying, None, CurvatureEstimate]:
    """Estimate the curvature of the base's predictions, see :mod:`trainer.preserve.curvature_estimate`.

    It depends on the seed, but not on how far the run has come.

    Args:
        step: training steps done, for the events.

    Yields:
        the progress.
    """
    count = data.preservation.study_images
    layers = [layer for module in state.modules.values() for layer in adapter.lora_layers(module)]
    sketches = _Sketches(layers, state.device)
    at_once = state.chosen.micro_batch
    calibration: list[tuple[Batch, torch.Tensor]] = []
    values = 0
    with adapter.switched_off(state.modules), sketches.installed():
        for first in range(0, count, at_once):
            numbers = range(first, min(first + at_once, count))
            batch = make_study_batch(data, config.seed, denoiser, numbers, state.device)
            with torch.enable_grad():
                prediction = sketches.forward(lambda batch=batch: _predict(state, denoiser, batch))
                if prediction.requires_grad:
                    (prediction * _probe(config.seed, numbers, prediction)).sum().backward()
            values = prediction[0].numel()
            if first < CALIBRATION_IMAGES:
                calibration.append((batch, prediction.detach()))
            yield Studying(step, numbers.stop, count)
    state.optimizer.zero_grad()
    estimate = sketches.finish(count, values)
    return estimate.calibrated(_calibration(state, denoiser, data, config, estimate, calibration))


def _predict(state: Assembly, denoiser: Denoiser, batch: Batch) -> torch.Tensor:
    conditioning = state.encode(batch.prompts) if state.trains_text else batch.conditioning
    noisy_latents = denoiser.noisy_latents(batch.latents, batch.noise, batch.times)
    return denoiser.predict(state.network, noisy_latents, batch.times, conditioning)


def _probe(seed: int, numbers: range, prediction: torch.Tensor) -> torch.Tensor:
    """A random projection of each prediction, drawn for each image by itself."""
    shape = prediction.shape[1:]
    drawn = [torch.randn(shape, generator=generator_for(seed, "probe", number)) for number in numbers]
    return torch.stack(drawn).to(prediction.device)


class _Sketches:
    """Sketches of the inputs of layers, and of the gradients with respect to their outputs."""

    def __init__(self, layers: list[Any], device: torch.device) -> None:
        self._layers = layers
        shapes = [layer.get_base_layer().weight.shape for layer in layers]
        self._channels_first = [len(shape) == 4 for shape in shapes]  # convolutions
        self._inputs = [SecondMomentSketch(shape[1], device) for shape in shapes]
        self._outputs = [SecondMomentSketch(shape[0], device) for shape in shapes]
        self._rows = [0] * len(layers)
        self._forward = False

    @contextmanager
    def installed(self) -> Iterator[None]:
        """Inside, the layers' forward and backward passes are recorded."""
        handles = [
            layer.register_forward_hook(lambda module, given, output, number=number: self._see(number, given, output))
            for number, layer in enumerate(self._layers)
        ]
        try:
            yield
        finally:
            for handle in handles:
                handle.remove()

    def forward(self, predict: Any) -> torch.Tensor:
        """Record the inputs of the layers while ``predict`` runs, and not when checkpointing runs blocks again."""
        self._forward = True
        try:
            prediction: torch.Tensor = predict()
        finally:
            self._forward = False
        return prediction

    def _see(self, number: int, given: tuple[torch.Tensor, ...], output: torch.Tensor) -> None:
        if self._forward:
            rows = self._as_rows(number, given[0].detach())
            self._inputs[number].add(rows)
            self._rows[number] += len(rows)
        if not torch.is_grad_enabled():
            return
        if not output.requires_grad:
            output.requires_grad_(True)  # the base is frozen, so that no layer before had a gradient
        output.register_hook(lambda gradient: self._outputs[number].add(self._as_rows(number, gradient)))

    def _as_rows(self, number: int, values: torch.Tensor) -> torch.Tensor:
        """Tokens or pixels as rows, [n, width]."""
        return (values.movedim(1, -1) if self._channels_first[number] else values).flatten(0, -2)

    def finish(self, images: int, values: int) -> CurvatureEstimate:
        """The estimate, without calibration.

        Args:
            images: number of images.
            values: numbers in a prediction.
        """
        inputs = [sketch.finish(1 / rows) for sketch, rows in zip(self._inputs, self._rows, strict=True)]
        return CurvatureEstimate.of(inputs, [sketch.finish(1 / images / values) for sketch in self._outputs])


def _calibration(
    state: Assembly,
    denoiser: Denoiser,
    data: TrainingData,
    config: TrainConfig,
    estimate: CurvatureEstimate,
    calibration: list[tuple[Batch, torch.Tensor]],
) -> float:
    """Measured change by estimated change, for a step along the signs of the photos' gradient, as Adam's first is."""
    parameters: list[torch.Tensor] = list(state.parameters)
    own = [parameter.detach().clone() for parameter in parameters]
    layers = [layer for module in state.modules.values() for layer in adapter.layers_of(module)]
    try:
        with torch.no_grad():
            for number, layer in enumerate(layers):
                random = generator_for(config.seed, "calibration", number)
                bound = 1 / layer.down.shape[1] ** 0.5  # PEFT's initial values
                layer.down.copy_((torch.rand(layer.down.shape, generator=random) * 2 - 1) * bound)
                layer.up.zero_()
        gradients = _photo_gradients(state, denoiser, data, config, [layer.up for layer in layers])
        with torch.no_grad():
            for layer, gradient in zip(layers, gradients, strict=True):
                layer.up.copy_(-gradient.sign())
            size = (CALIBRATION_CHANGE / max(1e-30, float(estimate.change(layers)))) ** 0.5
            for layer in layers:
                layer.up.mul_(size)
            changes = [
                torch.nn.functional.mse_loss(_predict(state, denoiser, batch), before).item() * len(before)
                for batch, before in calibration
            ]
    finally:
        with torch.no_grad():
            torch._foreach_copy_(parameters, own)
        state.optimizer.zero_grad()
    measured = sum(changes) / sum(len(before) for _, before in calibration)
    return measured / CALIBRATION_CHANGE


def _photo_gradients(
    state: Assembly, denoiser: Denoiser, data: TrainingData, config: TrainConfig, ups: list[torch.Tensor]
) -> list[torch.Tensor]:
    """The gradients of the photos' loss with respect to the LoRA's second factors."""
    sums = [torch.zeros_like(up) for up in ups]
    for number in range(-(-CALIBRATION_IMAGES // config.train_batch_size)):
        micro_step = make_micro_step(data, config, denoiser, number, state.device)
        for batch in (part for whole in micro_step.batches for part in whole.split(state.chosen.micro_batch)):
            with torch.enable_grad():
                if state.trains_text:
                    batch = replace(batch, conditioning=state.encode(batch.prompts))
                losses = batch_losses(denoiser, state.network, batch, micro_step.terms, config.snr_gamma)
                found = torch.autograd.grad(losses.total, ups, allow_unused=True)
            for total, gradient in zip(sums, found, strict=True):
                if gradient is not None:
                    total += gradient
    return sums
