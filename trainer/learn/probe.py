"""Scores of the adapter on fixed noise, from which a run's best step is chosen (:mod:`trainer.runs.best_step`).

Every scored step sees the same latents, noise and times, and they depend neither on the seed nor on the settings. So a
score changes only because the weights have changed. Nothing is drawn from a random state, and no gradient is computed:
a run has the same bits with and without scores.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import replace

import torch

from ..base.denoiser import Denoiser
from ..machine.draws import generator_for, low_discrepancy
from . import adapter
from .assembly import NETWORK, Assembly
from .batch import Batch, Term
from .data import Photos, TrainingData
from .loss import INSTANCE_LOSS, batch_losses

PHOTO_LOSS, HELD_OUT_LOSS, CLASS_DRIFT, SCENE_KEPT = "photo_loss", "held_out_loss", "class_drift", "scene_kept"

PHOTO_VIEWS, HELD_OUT_VIEWS = 4, 2
"""Noisy photos for a loss. Their times are spread evenly, because most of a loss's variance comes from them."""

SCENE_TIMES = (0.65, 0.8)
"""Uniform numbers for the times at which prompts are compared: high noise, where a prompt decides what is drawn."""

TINY = 1e-12
"""Instead of dividing by 0, for a base that ignores its prompts."""


class Probe:
    """Scores the adapter of a run.

    Args:
        denoiser: predicts with the network.
        data: photos and encoded prompts, with those to compare.
        state: the network with its adapter.
        snr_gamma: weighting of the losses, as in training.
    """

    def __init__(self, denoiser: Denoiser, data: TrainingData, state: Assembly, snr_gamma: float) -> None:
        assert data.probe is not None
        self._denoiser, self._data, self._state, self._snr_gamma = denoiser, data, state, snr_gamma
        self._prompts = data.probe
        self._photos = self._views(data.photos, PHOTO_VIEWS, "photos")
        self._held_out = self._views(data.held_out, HELD_OUT_VIEWS, "held out") if data.held_out else []
        self._base: torch.Tensor | None = None

    def scores(self, with_adapter: bool = True) -> dict[str, float]:
        """The scores of the current weights.

        Args:
            with_adapter: False scores the base.

        Returns:
            ``photo_loss``, and ``held_out_loss`` if something is held out: the loss on the photos.
            ``class_drift``: how far the prediction for the class prompt is from the base's, as a mean squared error, in
            units of what the class prompt changes in the base's prediction for the empty prompt; 0 for the base.
            ``scene_kept``: how much of what the words of a scene change in the base's prediction for the class prompt
            they still change in the prediction for the subject's; about 1 for the base, 0 if they are ignored.
        """
        with torch.no_grad(), self._evaluating():
            if self._base is None:
                with adapter.switched_off(self._state.modules):
                    self._base = self._predict(("", self._prompts.class_prompt, *self._prompts.class_in_scenes))
            if with_adapter:
                return self._scores(self._base)
            with adapter.switched_off(self._state.modules):
                return self._scores(self._base)

    def _scores(self, base: torch.Tensor) -> dict[str, float]:
        prompts = self._prompts
        now = self._predict((prompts.class_prompt, prompts.subject, *prompts.subject_in_scenes))
        drift = (now[0] - base[1]).square().mean() / (base[1] - base[0]).square().mean().clamp(min=TINY)
        changes, left = (base[2:] - base[1]).flatten(1), (now[2:] - now[1]).flatten(1)
        kept = ((changes * left).sum(1) / changes.square().sum(1).clamp(min=TINY)).mean()
        losses = {PHOTO_LOSS: self._loss(self._photos)}
        if self._held_out:
            losses[HELD_OUT_LOSS] = self._loss(self._held_out)
        found = losses | {CLASS_DRIFT: drift, SCENE_KEPT: kept}
        values = torch.stack(list(found.values())).tolist()  # one transfer, as it waits for the GPU
        return {name: value for name, value in zip(found, values, strict=True) if math.isfinite(value)}

    def _views(self, photos: Photos, count: int, purpose: str) -> list[Batch]:
        """``count`` noisy photos, in batches of one size."""
        times = self._denoiser.times(low_discrepancy(0, count, 0, f"probe {purpose}"))
        sizes: dict[torch.Size, list[int]] = {}
        for view in range(count):
            sizes.setdefault(photos.latents[view % len(photos.captions)].shape, []).append(view)
        batches = []
        for size, views in sizes.items():
            shown = [view % len(photos.captions) for view in views]
            noise = [torch.randn(size, generator=generator_for(0, f"probe {purpose}", view)) for view in views]
            prompts = tuple(photos.captions[photo] for photo in shown)
            batches.append(
                Batch(
                    torch.stack([photos.latents[photo] for photo in shown]),
                    torch.stack(noise),
                    times[views],
                    self._data.encode(prompts),
                    (INSTANCE_LOSS,) * len(views),
                    None if photos.masks is None else torch.stack([photos.masks[photo] for photo in shown]),
                    prompts,
                ).to(self._state.device)
            )
        return batches

    def _loss(self, batches: Sequence[Batch]) -> torch.Tensor:
        terms = (Term(INSTANCE_LOSS, 1.0, sum(len(batch.prompts) for batch in batches)),)
        parts = [part for batch in batches for part in self._split(batch)]
        network = self._state.modules[NETWORK]
        losses = [batch_losses(self._denoiser, network, part, terms, self._snr_gamma).total for part in parts]
        return torch.stack(losses).sum()

    def _predict(self, prompts: Sequence[str]) -> torch.Tensor:
        """The predictions for each prompt on the same noisy latents, float32 [prompts, views, c, h, w]."""
        photos, views = self._data.photos, len(SCENE_TIMES)
        latents = photos.latents[0].expand(views, *photos.latents[0].shape)
        noise = torch.randn(latents.shape, generator=generator_for(0, "probe scenes", 0))
        times = self._denoiser.times(torch.tensor(SCENE_TIMES, dtype=torch.float64))
        repeated = [prompt for prompt in prompts for _ in range(views)]
        batch = Batch(
            latents.repeat(len(prompts), 1, 1, 1),
            noise.repeat(len(prompts), 1, 1, 1),
            times.repeat(len(prompts)),
            self._data.encode(repeated),
            ("",) * len(repeated),
            prompts=tuple(repeated),
        ).to(self._state.device)
        denoiser, network = self._denoiser, self._state.modules[NETWORK]
        predictions = [
            denoiser.predict(
                network,
                denoiser.noisy_latents(part.latents, part.noise, part.times),
                part.times,
                part.conditioning,
            )
            for part in self._split(batch)
        ]
        return torch.cat(predictions).unflatten(0, (len(prompts), views))

    def _split(self, batch: Batch) -> Iterator[Batch]:
        """Micro-batches as in training, with their prompts encoded by the text encoders that are trained."""
        for part in batch.split(self._state.chosen.micro_batch):
            if self._state.trains_text:
                part = replace(part, conditioning=self._state.encode_to_draw(part.prompts))
            yield part

    @contextmanager
    def _evaluating(self) -> Iterator[None]:
        """Inside, modules are in evaluation mode: no dropout, and no gradient checkpointing."""
        modules = [module for top in self._state.modules.values() for module in top.modules()]
        training = [module for module in modules if module.training]
        try:
            for module in training:
                module.training = False
            yield
        finally:
            for module in training:
                module.training = True
