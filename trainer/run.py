"""A whole run: find it again or train it, keep it safe meanwhile, and leave the adapter in its folder."""

from __future__ import annotations

import logging
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING

import torch

from .base_model import BaseModel
from .config import TrainConfig, run_key
from .data import TrainingData
from .errors import SubjectBoothError
from .events import CheckpointSaved, Event, Finished, StepDone, ValidationStep
from .lock import owned
from .loop import Training
from .metadata import lora_metadata
from .run_folder import RunFolder
from .subject import Subject

if TYPE_CHECKING:
    from .priors import ClassPriors

logger = logging.getLogger("subjectbooth")


class Run:
    """One subject, one base, one set of settings.

    Args:
        base: what to train on.
        subject: photos and words.
        priors: class images; None trains without keeping the class.
        config: the requested settings.
        root: the folder that holds all runs.
        device: where to train; None lets accelerate choose.

    Raises:
        SubjectBoothError: photos and settings do not fit.
    """

    def __init__(
        self, base: BaseModel, subject: Subject, priors: ClassPriors | None, config: TrainConfig, root: Path,
        device: torch.device | None = None,
    ) -> None:
        self._base, self._subject, self._priors, self._config = base, subject, priors, config
        self._device = device
        self._prepared = subject.prepare(config.resolution)
        key = run_key(config, self._prepared.digest, base.digest, priors.digest if priors else None)
        self.folder = RunFolder(root, key, subject.trigger)
        self._stop = threading.Event()

    def stop_and_keep(self) -> None:
        """Have the run end at its next step and take the adapter of that step for its result.

        Any thread may call it, before or while :meth:`events` is read. The same run then is finished, until it is
        told to go on; a run without a single step first makes one.
        """
        self._stop.set()

    def events(self, force_retrain: bool = False, go_on: bool = False) -> Iterator[Event]:
        """Train, or say that it was done before.

        Whatever ends the reading (a cancel closes the generator, an error passes through it, memory runs out), the
        steps so far are saved as a checkpoint and as an adapter, and the same run goes on from there.

        Args:
            force_retrain: start from step 0 even when the run is finished or has a checkpoint.
            go_on: train a run that was stopped and kept to its planned steps.

        Yields:
            The events of :meth:`trainer.loop.Training.events`, :class:`CheckpointSaved`, and :class:`Finished` last.
        """
        done = None if force_retrain else self._done(go_on)
        if done is not None:
            yield Finished(done[0], done[1], trained=False)
            return
        with owned(self.folder.path):
            if force_retrain:
                self.folder.forget()
            elif go_on:
                self.folder.revoke()
            yield from self._owned_events()

    def _done(self, go_on: bool) -> tuple[int, Path] | None:
        """The last step of what need not be trained again, and its adapter."""
        steps = self._config.steps
        kept = None if go_on else self.folder.kept_step(steps)
        for step in (steps, kept):
            found = self.folder.finished_lora(step) if step is not None else None
            if step is not None and found is not None:
                return step, found
        return None

    def _owned_events(self) -> Iterator[Event]:
        steps = self._config.steps
        started = self.folder.open({"config": self._config.to_json(), "trigger": self._subject.trigger})
        resume = self.folder.load_checkpoint(steps)
        if resume and resume.step == self.folder.kept_step(steps):
            self._stop.set()  # the adapter that was kept is gone or damaged: the checkpoint still has it
        self.folder.truncate_events(resume.step if resume else 0)
        data, shown = self._encode()
        training = Training(self._base, data, self._config, shown, resume, self._device)
        with training:
            yield from self._train(training, started)
            step = training.step
        yield Finished(step, self.folder.lora_path(step), trained=True)

    def _train(self, training: Training, started: float) -> Iterator[Event]:
        saved_step, saved_at = training.step, time.monotonic()
        try:
            for event in training.events():
                if not isinstance(event, ValidationStep):
                    self.folder.log(event)
                yield event
                if self._stop.is_set() and 0 < training.step < self._config.steps:
                    self._save(training, started, with_lora=True)
                    self.folder.keep(training.step, self._config.steps)
                    saved_step = training.step
                    return
                if not isinstance(event, StepDone):
                    continue
                shown = event.step == event.steps or self._config.validation_is_due(event.step)
                if shown or time.monotonic() - saved_at >= self._config.checkpoint_seconds:
                    path = self._save(training, started, with_lora=shown)
                    saved_step, saved_at = training.step, time.monotonic()
                    yield CheckpointSaved(training.step, path)
            # All steps were done before, but the adapter is gone or damaged: the checkpoint still has it.
            if self.folder.finished_lora(self._config.steps) is None:
                self._save(training, started, with_lora=True)
        finally:
            if training.is_built and training.step > saved_step:
                self._save(training, started, with_lora=True)
                logger.info("kept %d of %d steps in %s", training.step, self._config.steps, self.folder.path)

    def _save(self, training: Training, started: float, with_lora: bool) -> Path:
        """Checkpoint, and the adapter too where somebody will want to use it: at pictures, and wherever a run ends."""
        if with_lora:
            tensors = training.lora()
            metadata = lora_metadata(
                tensors, self._subject, self._base, self._config, step=training.step, run_key=self.folder.key,
                started=started, class_images=len(self._priors.latents) if self._priors else 0)
            self.folder.write_lora(training.step, tensors, metadata)
        return self.folder.save_checkpoint(training.snapshot())

    def _encode(self) -> tuple[TrainingData, tuple[str, ...]]:
        """Everything the text encoder and the VAE have to say, once, while they still are in memory."""
        base, prepared, priors = self._base, self._prepared, self._priors
        shown = tuple(prompt.replace("{subject}", self._subject.trigger) for prompt in self._config.validation_prompts)
        class_prompt = priors.prompt if priors else ""
        prompts = list(dict.fromkeys([*prepared.captions, class_prompt, *shown, ""]))
        data = TrainingData(
            latents=base.codec.encode(prepared.images),
            captions=prepared.captions,
            encoded=dict(zip(prompts, base.prompts.encode(prompts), strict=True)),
            prior_latents=priors.latents if priors else None,
            class_prompt=class_prompt,
            flipped_latents=base.codec.encode(prepared.images.flip(-1)) if self._config.flip else None,
            masks=self._latent_masks())
        return data, shown

    def _latent_masks(self) -> torch.Tensor | None:
        if not self._config.masked_loss:
            return None
        if self._prepared.masks is None:
            raise SubjectBoothError("masked_loss without a mask", "a mask for the photos",
                                    "wire a MASK to LoadSubjectImages, use photos with transparency, or turn it off",
                                    "masked_loss")
        return torch.nn.functional.interpolate(self._prepared.masks, scale_factor=1 / 8, mode="area")
