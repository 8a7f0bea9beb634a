"""A whole run: find it again or train it, keep it safe meanwhile, and leave the adapter in its folder."""

from __future__ import annotations

import logging
import threading
import time
from collections.abc import Generator, Iterator
from dataclasses import replace
from pathlib import Path

import torch

from ..base.base_model import BaseModel
from ..base.finite import check_latents, check_prompts
from ..config import TrainConfig, run_key
from ..events import Adjusted, CheckpointSaved, Event, Finished, Started, StepDone, ValidationStep
from ..files.lock import lock_folder
from ..files.storage import disk_errors, sha256_of
from ..learn import adapter
from ..learn.data import TrainingData
from ..learn.loop import Training
from ..learn.optimizers import with_usable_optimizer
from ..machine.numerics import default_numerics
from ..memory.plan import FreeMemory, Plan
from ..preserve.none import NoPreservation
from ..preserve.preservation import BaseIdentity, Preservation
from ..subject.subject import PreparedSubject, Subject
from .folder import RunFolder
from .lora_reader import is_untrained
from .metadata import lora_metadata

logger = logging.getLogger("subjectbooth")


class Run:
    """One subject, one base, one set of settings.

    Args:
        base: what to train on.
        subject: photos and words.
        preservation: how the class is kept; None does not keep it.
        config: the requested settings.
        root: the folder that holds all runs.
        device: where to train; None lets accelerate choose.
        free: bytes free on a device, for the plan; None asks torch and the system.

    Attributes:
        warnings: sentences for the user about what goes into the run.

    Raises:
        SubjectBoothError: photos, class images, base and settings do not fit.
    """

    def __init__(
        self,
        base: BaseModel,
        subject: Subject,
        preservation: Preservation | None,
        config: TrainConfig,
        root: Path,
        device: torch.device | None = None,
        free: FreeMemory | None = None,
    ) -> None:
        config, fall_back = with_usable_optimizer(config, device)
        preservation = preservation or NoPreservation()
        self._base, self._subject, self._preservation, self._config = base, subject, preservation, config
        self._device, self._free = device, free
        # One group of photos, or one for each aspect-ratio bucket.
        side, masks = config.resolution, config.masked_loss
        latents = base.denoiser.latent_size(side, side)
        kept = preservation.check(
            latents, BaseIdentity(base.family, base.sampling_digest or base.digest, base.denoiser.latent_factor)
        )
        masks_cut = subject.check_masks(side, buckets=config.enable_bucket) if masks else ""
        self.warnings = tuple(filter(None, (fall_back, *kept, masks_cut, _small_resolution(side, base))))
        self._prepared = (
            subject.prepare_buckets(side, with_masks=masks)
            if config.enable_bucket
            else (subject.prepare(side, with_masks=masks),)
        )
        digests = [group.digest for group in self._prepared]
        digest = sha256_of(*digests) if config.enable_bucket else digests[0]
        captions = [caption for group in self._prepared for caption in group.captions]
        if any(base.prompt_of(caption) != caption for caption in captions):
            digest = sha256_of(digest, "literal captions")  # such a caption used to be read as a prompt's syntax
        key = run_key(config, digest, base.digest, preservation.key, subject.trigger)
        self.folder = RunFolder(root, key, subject.trigger)
        self._stop = threading.Event()

    def stop_and_keep(self) -> None:
        """Have the run end at its next step and take the adapter of that step for its result.

        Any thread may call it, before or while :meth:`events` is read. The same run then is finished, until it is
        told to go on; a run without a single step first makes one.
        """
        self._stop.set()

    def check(self, class_prompt: str) -> None:
        """Find before class images are made what a training would be refused for; nothing is loaded or read for it.

        Args:
            class_prompt: that of the class images.

        Raises:
            SubjectBoothError: a rank too large for the base, or a prompt that a text encoder in training cannot take
                in. (Masks and class images are checked when the run is made.)
        """
        base, config = self._base, self._config
        network = base.denoiser.outline()
        if network is not None:
            adapter.check_layers(base.denoiser.adapter_layers(network, config.lora_targets), config.rank)
        if config.train_text_encoder and base.text is not None:
            adapter.check_rank(config.rank, base.text.narrowest)
            captions = [base.prompt_of(caption) for group in self._prepared for caption in group.captions]
            for prompt in dict.fromkeys([*captions, class_prompt, *self.shown]):
                base.text.tokenize(prompt)

    def plan(self) -> Plan:
        """What a run from step 0 would keep in memory. Reads and encodes everything, writes and trains nothing."""
        with Training(self._base, self._encode(), self._config, (), None, self._device, self._free) as training:
            return training.plan()

    @property
    def shown(self) -> tuple[str, ...]:
        """The prompts of the validation pictures."""
        return tuple(prompt.replace("{subject}", self._subject.trigger) for prompt in self._config.validation_prompts)

    def validations(self, steps: int) -> tuple[list[tuple[int, torch.Tensor]], list[int]]:
        """The pictures of these prompts up to ``steps``, as :meth:`RunFolder.validations` gives them, and the steps
        whose pictures are due and not there: drawn with other prompts or sampling settings, or not at all."""
        config = self._config
        found = self.folder.validations(steps, self.shown, (config.validation_steps, config.validation_guidance_scale))
        there = {step for step, _ in found}
        due = [step for step in range(1, steps + 1) if self._config.validation_is_due(step)]
        return found, [step for step in due if step not in there]

    def events(self, force_retrain: bool = False, go_on: bool = False) -> Generator[Event, None, None]:
        """Train, or say that it was done before.

        Whatever ends the reading (a cancel closes the generator, an error passes through it, memory runs out), the
        steps so far are saved as a checkpoint and as an adapter, and the same run goes on from there.

        Args:
            force_retrain: start from step 0 even when the run is finished or has a checkpoint.
            go_on: train a run that was stopped and kept to its planned steps.

        Yields:
            The events of :meth:`trainer.learn.loop.Training.events`, :class:`CheckpointSaved`, and :class:`Finished`
            last.
        """
        done = None if force_retrain else self._done(go_on)
        if done is not None:
            yield Finished(done[0], done[1], trained=False, warning=_learned_nothing(done[1], done[0]))
            return
        with lock_folder(self.folder.path):
            if force_retrain:
                self.folder.forget()
            elif go_on:
                self.folder.revoke()
            yield from self._owned_events()

    def _done(self, go_on: bool) -> tuple[int, Path] | None:
        """The last step of what need not be trained again, and its adapter."""
        steps = self._config.steps
        with disk_errors("the run's folder cannot be read", self.folder.path):
            kept = None if go_on else self.folder.kept_step(steps)
            for step in (kept, steps):  # both are there where a run that was finished was trained anew and stopped
                found = self.folder.finished_lora(step) if step is not None else None
                if step is not None and found is not None:
                    return step, found
        return None

    def _owned_events(self) -> Iterator[Event]:
        steps = self._config.steps
        started = self.folder.open(
            {
                "config": self._config.to_json(),
                "trigger": self._subject.trigger,
                **self._preservation.record,
            }
        )
        resume = self.folder.load_checkpoint(steps)
        for note in self.folder.notes:
            yield Adjusted(resume.step if resume else 0, note, resume.chosen if resume else {})
        if resume and resume.step == self.folder.kept_step(steps):
            self._stop.set()  # the adapter that was kept is gone or damaged: the checkpoint still has it
        self.folder.truncate_events(resume.step if resume else 0, resume.losses if resume else ())
        training = Training(self._base, self._encode(), self._config, self.shown, resume, self._device, self._free)
        with training:
            yield from self._train(training, started)
            step, chosen = training.step, training.chosen
        path = self.folder.lora_path(step)
        warning = _learned_nothing(path, step)
        if warning:
            told = Adjusted(step, warning, chosen.as_settings())
            self.folder.log(told)
            yield told
        yield Finished(step, path, trained=True, warning=warning)

    def _train(self, training: Training, started: float) -> Iterator[Event]:
        saved_step, saved_at = training.step, time.monotonic()
        adapter_step = 0  # of the adapter that was written last
        try:
            for event in training.events():
                if isinstance(event, Started):
                    event = replace(event, notes=(*self.warnings, *event.notes))
                if not isinstance(event, ValidationStep):
                    self.folder.log(event)
                yield event
                if self._stop.is_set() and 0 < training.step < self._config.steps:
                    # A step with pictures was saved before them, and while they are drawn the model has the average.
                    if adapter_step != training.step:
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
                    adapter_step = training.step if shown else adapter_step
                    yield CheckpointSaved(training.step, path)
            # All steps were done before, but the adapter is gone or damaged: the checkpoint still has it.
            if self.folder.finished_lora(self._config.steps) is None:
                self._save(training, started, with_lora=True)
        finally:
            # Also where a checkpoint of this very step is there, but no adapter that somebody could use.
            if (
                training.is_built
                and training.step
                and (training.step > saved_step or not self.folder.lora_path(training.step).is_file())
            ):
                self._save_last(training, started)

    def _save_last(self, training: Training, started: float) -> None:
        """Keep the steps so far while something else (a cancel, an error) ends the run: that is what is to be told."""
        try:
            self._save(training, started, with_lora=True)
        except Exception as error:
            logger.error("the steps since the last checkpoint are lost: %s", error)
        else:
            logger.info("kept %d of %d steps in %s", training.step, self._config.steps, self.folder.path)

    def _save(self, training: Training, started: float, with_lora: bool) -> Path:
        """Checkpoint, and the adapter too where somebody will want to use it: at pictures, and wherever a run ends."""
        if with_lora:
            tensors = training.lora()
            metadata = lora_metadata(
                tensors,
                self._subject,
                self._base,
                self._config,
                step=training.step,
                run_key=self.folder.key,
                started=started,
                preservation=self._preservation.metadata,
                chosen=training.chosen,
                buckets={
                    f"{group.images.shape[3]}x{group.images.shape[2]}": len(group.images) for group in self._prepared
                },
            )
            self.folder.write_lora(training.step, tensors, metadata)
        return self.folder.save_checkpoint(training.snapshot())

    def _encode(self) -> TrainingData:
        """Everything the text encoder and the VAE have to say, once, while they still are in memory."""
        with default_numerics():
            return self._encode_all()

    def _encode_all(self) -> TrainingData:
        base, groups = self._base, self._prepared
        captions = tuple(base.prompt_of(caption) for group in groups for caption in group.captions)
        prompts = list(dict.fromkeys([*captions, *self._preservation.prompts, *self.shown, ""]))
        names = [f"photo {index + 1} ({self._subject.photos[index].name})" for group in groups for index in group.order]
        encoded = dict(zip(prompts, base.prompts.encode(prompts), strict=True))
        check_prompts(encoded)
        latents = _one([base.codec.encode(group.images) for group in groups])
        flipped = _one([base.codec.encode(group.images.flip(-1)) for group in groups]) if self._config.flip else None
        check_latents(latents, names)
        if flipped is not None:
            check_latents(flipped, names)
        return TrainingData(
            latents=latents,
            captions=captions,
            encoded=encoded,
            preservation=self._preservation,
            flipped_latents=flipped,
            masks=_one([_latent_masks(group, base.denoiser.latent_factor) for group in groups])
            if self._config.masked_loss
            else None,
            names=tuple(names),
            square=base.denoiser.latent_size(self._config.resolution, self._config.resolution),
        )


def _learned_nothing(lora: Path, step: int) -> str:
    """What to say of an adapter that is as it was before the first step; empty for one that has learned."""
    if not is_untrained(lora):
        return ""
    return (
        f"This LoRA has learned nothing: after step {step} all of it is still zero, so it changes no picture. "
        "Check the masks (with masked_loss only what they cover counts), the photos and learning_rate"
    )


def _small_resolution(resolution: int, base: BaseModel) -> str:
    native = base.denoiser.native_resolution
    # Below 256 it is meant so: a base for tiny pictures, such as the demo's, or a trial.
    if not 256 <= resolution < 0.6 * native:
        return ""
    return (
        f"{resolution} px is far below the {native} px that {base.family} was trained at, so pictures of "
        f"{native} px will look worse. Set resolution to {native} if memory allows"
    )


def _one(groups: list[torch.Tensor]) -> torch.Tensor | tuple[torch.Tensor, ...]:
    """Groups of pictures of one size each, as one sequence of pictures."""
    return groups[0] if len(groups) == 1 else tuple(picture for group in groups for picture in group)


def _latent_masks(group: PreparedSubject, factor: int) -> torch.Tensor:
    assert group.masks is not None  # Subject.check_masks refuses a subject without any
    return torch.nn.functional.interpolate(group.masks, scale_factor=1 / factor, mode="area")
