"""A whole run: find it again or train it, keep it safe meanwhile, and leave the adapter in its folder."""

from __future__ import annotations

import logging
import threading
import time
from collections.abc import Generator, Iterator
from contextlib import closing, suppress
from dataclasses import replace
from pathlib import Path

import torch

from ..base.base_model import BaseModel
from ..config import TrainConfig
from ..errors import SubjectBoothError
from ..events import Adjusted, CheckpointSaved, Event, Finished, Scores, Started, StepDone, ValidationStep
from ..files.storage import disk_errors
from ..learn.checkpoint import Checkpoint
from ..learn.loop import Training
from ..memory.plan import FreeMemory, Plan
from ..preserve.none import NoPreservation
from ..preserve.preservation import Preservation
from ..subject.subject import Subject
from .encodings import EncodingCache
from .evaluator import Evaluator
from .folder import RunFolder
from .lora_reader import is_untrained
from .metadata import lora_metadata
from .preparation import check_early, encode, prepare
from .result import LAST, STOPPED, Result
from .writer import FolderWriter, MakeWriter

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
        encodings: kept by the caller for further runs of the same base; None keeps nothing.
        make_writer: what writes the run's folder, by default all of it.
        evaluator: turns events into scores, which are logged and yielded after the event.

    Attributes:
        folder: what is in the run's folder.
        writer: what writes it.
        result: which step counts, and why; None until :meth:`events` has come to its end.
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
        *,
        encodings: EncodingCache | None = None,
        make_writer: MakeWriter = FolderWriter,
        evaluator: Evaluator | None = None,
    ) -> None:
        self._base, self._subject, self._preservation = base, subject, preservation or NoPreservation()
        self._device, self._free, self._evaluator = device, free, evaluator
        self._encodings = encodings or EncodingCache(limit=0)
        self._prepared = prepare(base, subject, self._preservation, config, device, self._encodings)
        self._config, self.warnings = self._prepared.config, self._prepared.warnings
        self.folder = RunFolder(root, self._prepared.key, subject.trigger)
        self.writer = make_writer(self.folder)
        self.result: Result | None = None
        self._stop = threading.Event()

    def stop_and_keep(self) -> None:
        """Have the run end at its next step and take the adapter of that step for its result.

        Any thread may call it, before or while :meth:`events` is read. The same run then is finished, until it is
        told to go on; a run without a single step first makes one.
        """
        self._stop.set()

    def check(self, class_prompt: str) -> None:
        """Find before class images are made what a training would be refused for, see
        :func:`trainer.runs.preparation.check_early`.

        Args:
            class_prompt: that of the class images.
        """
        check_early(self._base, self._prepared, (class_prompt, *self.validation_prompts))

    def plan(self) -> Plan:
        """What a run from step 0 would keep in memory. Reads and encodes everything, writes and trains nothing."""
        with self._training((), None) as training:
            return training.plan()

    @property
    def validation_prompts(self) -> tuple[str, ...]:
        """The prompts of the validation pictures."""
        return tuple(prompt.replace("{subject}", self._subject.trigger) for prompt in self._config.validation_prompts)

    def validations(self, steps: int) -> tuple[list[tuple[int, torch.Tensor]], list[int]]:
        """The pictures of these prompts up to ``steps``, as :meth:`RunFolder.validations` gives them, and the steps
        whose pictures are due and not there: drawn with other prompts or sampling settings, or not at all."""
        config = self._config
        found = self.folder.validations(
            steps, self.validation_prompts, (config.validation_steps, config.validation_guidance_scale)
        )
        there = {step for step, _ in found}
        due = [step for step in range(1, steps + 1) if self._config.validation_is_due(step)]
        return found, [step for step in due if step not in there]

    def events(self, force_retrain: bool = False, resume_stopped: bool = False) -> Generator[Event, None, None]:
        """Train, or say that it was done before.

        Whatever ends the reading (a cancel closes the generator, an error passes through it, memory runs out), the
        steps so far are saved as a checkpoint and as an adapter, and the same run goes on from there.

        Args:
            force_retrain: start from step 0 even when the run is finished or has a checkpoint.
            resume_stopped: train a run that was stopped and kept to its planned steps.

        Yields:
            The events of :meth:`trainer.learn.loop.Training.events`, :class:`CheckpointSaved`, :class:`Scores` where
            there is an evaluator, and :class:`Finished` last.
        """
        done = None if force_retrain else self._find_finished(resume_stopped)
        if done is not None:
            result, lora = done
            for note in self.folder.notes:
                yield Adjusted(result.step, note, {})
            yield self._finish(result, lora, trained=False)
            return
        with self.writer.lock():
            if force_retrain:
                self.writer.discard_progress()
            elif resume_stopped:
                self.writer.revoke_stops()
            events = self._run_training(force_retrain, resume_stopped)
            with closing(events):
                for event in events:
                    yield event
                    if self._evaluator is not None and not isinstance(event, Finished):
                        yield from self._log_scores(self._evaluator, event)

    def _find_finished(self, resume_stopped: bool) -> tuple[Result, Path] | None:
        """What need not be trained again, and its adapter."""
        steps = self._config.steps
        with disk_errors("the run's folder cannot be read", self.folder.path):
            known, last = self.folder.results(), Result(steps, steps, LAST)
            chosen = known.results.get(steps)
            # The last one too: both are there where a run that was finished was trained again and stopped.
            for result in (last,) if chosen is None or (resume_stopped and chosen.is_stopped) else (chosen, last):
                lora = self.folder.finished_lora(result.step)
                if lora is not None:
                    if chosen is None or known.is_damaged:
                        self._rebuild_result(chosen or result)
                    return result, lora
        return None

    def _rebuild_result(self, result: Result) -> None:
        """Write the result of a run that is finished and does not say so: it was damaged, or is of before there was
        one. Not where somebody else is at work or nothing can be written: a run that is found again is only read."""
        with suppress(SubjectBoothError), self.writer.lock():
            self.writer.write_result(result)

    def _run_training(self, force_retrain: bool, resume_stopped: bool) -> Generator[Event, None, None]:
        steps = self._config.steps
        started = self.writer.open(
            {
                "config": self._config.to_json(),
                "trigger": self._subject.trigger,
                **self._preservation.record,
            }
        )
        # With a writer that writes nothing, what should have been forgotten or revoked is still there.
        resume = None if force_retrain else self.folder.load_checkpoint(steps, self.writer.set_checkpoint_aside)
        for note in self.folder.notes:
            yield Adjusted(resume.step if resume else 0, note, resume.chosen if resume else {})
        if resume and not resume_stopped and resume.step == self.folder.kept_step(steps):
            self._stop.set()  # the adapter that was kept is gone or damaged: the checkpoint still has it
        self.writer.truncate_events(resume.step if resume else 0, resume.losses if resume else ())
        training = self._training(self.validation_prompts, resume)
        with training:
            yield from self._train_and_save(training, started)
            step, chosen = training.step, training.chosen
        result = Result(step, steps, LAST if step == steps else STOPPED)
        self.writer.write_result(result)
        finished = self._finish(result, self.folder.lora_path(step), trained=True)
        if finished.warning:
            told = Adjusted(step, finished.warning, chosen.as_settings())
            self.writer.log(told)
            yield told
        yield finished

    def _training(self, shown: tuple[str, ...], resume: Checkpoint | None) -> Training:
        data = encode(
            self._base,
            self._subject,
            self._preservation,
            self._prepared,
            self.validation_prompts,
            self._encodings,
            self._device,
        )
        return Training(self._base, data, self._config, shown, resume, self._device, self._free)

    def _finish(self, result: Result, lora: Path, trained: bool) -> Finished:
        self.result = result
        return Finished(result.step, lora, trained, _untrained_warning(lora, result.step))

    def _log_scores(self, evaluator: Evaluator, event: Event) -> Iterator[Scores]:
        values = dict(evaluator.scores(event))
        if values:
            scores = Scores(event.step, values)
            self.writer.log(scores)
            yield scores

    def _train_and_save(self, training: Training, started: float) -> Iterator[Event]:
        saved_step, saved_at = training.step, time.monotonic()
        adapter_step = 0  # of the adapter that was written last
        try:
            for event in training.events():
                if isinstance(event, Started):
                    event = replace(event, notes=(*self.warnings, *event.notes))
                if not isinstance(event, ValidationStep):
                    self.writer.log(event)
                yield event
                if self._stop.is_set() and 0 < training.step < self._config.steps:
                    # A step with pictures was saved before them, and while they are drawn the model has the average.
                    if adapter_step != training.step:
                        self._save(training, started, with_lora=True)
                    saved_step = training.step
                    return
                if not isinstance(event, StepDone):
                    continue
                shown = event.step == event.steps or self._config.validation_is_due(event.step)
                if shown or time.monotonic() - saved_at >= self._config.checkpoint_seconds:
                    self._save(training, started, with_lora=shown)
                    saved_step, saved_at = training.step, time.monotonic()
                    adapter_step = training.step if shown else adapter_step
                    yield CheckpointSaved(training.step, self.folder.checkpoint_path)
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
            return
        if self.folder.lora_path(training.step).is_file():
            logger.info("kept %d of %d steps in %s", training.step, self._config.steps, self.folder.path)

    def _save(self, training: Training, started: float, with_lora: bool) -> None:
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
                buckets=self._prepared.buckets,
            )
            self.writer.write_lora(training.step, tensors, metadata)
        self.writer.save_checkpoint(training.snapshot())


def _untrained_warning(lora: Path, step: int) -> str:
    """What to say of an adapter that is as it was before the first step; empty for one that has learned."""
    if not lora.is_file() or not is_untrained(lora):
        return ""
    return (
        f"This LoRA has learned nothing: after step {step} all of it is still zero, so it changes no picture. "
        "Check the masks (with masked_loss only what they cover counts), the photos and learning_rate"
    )
