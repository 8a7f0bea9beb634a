"""A complete run: reuses an existing result, or trains with checkpoints and writes the adapter to the run's folder."""

from __future__ import annotations

import logging
import threading
import time
from collections.abc import Generator, Iterator, Mapping
from contextlib import closing
from dataclasses import replace
from pathlib import Path

import torch

from ..base.base_model import BaseModel
from ..config import TrainConfig
from ..errors import SubjectBoothError
from ..events import Adjusted, CheckpointSaved, Event, Finished, Scores, Started, StepDone, Studying, ValidationStep
from ..files.safetensors_file import Serialized
from ..learn.checkpoint import Checkpoint
from ..learn.loop import Training
from ..learn.probe import PHOTO_LOSS
from ..machine.processes import current
from ..memory.plan import FreeMemory, Plan
from ..preserve.none import NoPreservation
from ..preserve.preservation import Preservation
from ..subject.subject import Subject
from .chosen_step import chosen_lora
from .encodings import EncodingCache
from .evaluator import Evaluator
from .folder import RunFolder
from .lora_reader import is_untrained
from .metadata import base_name, lora_metadata
from .outcome import Outcome
from .preparation import check_early, encode, prepare
from .result import CHOSEN, LAST, STOPPED, Result
from .writer import FolderWriter, MakeWriter, SilentWriter

logger = logging.getLogger("subjectbooth")


class Run:
    """A training run of one subject on one base with one set of settings.

    Args:
        base: the base to train on.
        subject: photos and words.
        preservation: the method of class preservation; None for none.
        config: the requested settings.
        root: the folder that contains all runs.
        device: the training device; None lets accelerate choose.
        free: returns the free bytes of a device, for the memory plan; None asks torch and the system.
        encodings: a cache shared with other runs of the same base; None disables caching.
        make_writer: creates the writer of the run's folder; None for one that writes in the main process only.
        evaluator: computes scores from events; they are logged and yielded after the event.

    Attributes:
        folder: read access to the run's folder.
        writer: write access to it.
        result: the result of the run; None until :meth:`events` is exhausted.
        warnings: sentences for the user about the inputs.

    Raises:
        SubjectBoothError: photos, class images, base and settings are not compatible.
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
        make_writer: MakeWriter | None = None,
        evaluator: Evaluator | None = None,
    ) -> None:
        base = base.with_times_of(config)
        self._base, self._subject, self._preservation = base, subject, preservation or NoPreservation()
        self._device, self._free, self._evaluator = device, free, evaluator
        self._encodings = encodings or EncodingCache(limit=0)
        self._prepared = prepare(base, subject, self._preservation, config, device, self._encodings)
        self._config, self.warnings = self._prepared.config, self._prepared.warnings
        self.folder = RunFolder(root, self._prepared.key, subject.trigger)
        self.writer = (make_writer or (FolderWriter if current().is_main else SilentWriter))(self.folder)
        self._outcome = Outcome(self.folder, self.writer, self._config)
        self.result: Result | None = None
        self._stop = threading.Event()

    @property
    def config(self) -> TrainConfig:
        """The requested settings, with AdamW in place of an unavailable optimizer."""
        return self._config

    def stop_and_keep(self) -> None:
        """Stop the run after its next step, and make the adapter of that step its result.

        Thread-safe; may be called before or during :meth:`events`. The same request then returns this result, until it
        is resumed with ``resume_stopped``. A run without any step first does one.
        """
        self._stop.set()

    def check(self, class_prompt: str) -> None:
        """Check rank and prompts before class images are generated, see :func:`trainer.runs.preparation.check_early`.

        Args:
            class_prompt: the prompt of the class images.

        Raises:
            SubjectBoothError: training would fail.
        """
        prompts = (class_prompt, *self._preservation.prompts, *self.validation_prompts)
        check_early(self._base, self._prepared, prompts)

    def plan(self) -> Plan:
        """The memory plan of a run from step 0. Loads and encodes everything, but neither trains nor writes files."""
        with self._training((), None) as training:
            return training.plan()

    @property
    def validation_prompts(self) -> tuple[str, ...]:
        """The prompts of the validation images, with the trigger words inserted."""
        return tuple(prompt.replace("{subject}", self._subject.trigger) for prompt in self._config.validation_prompts)

    @property
    def guidance_scale(self) -> float:
        """The guidance of the validation images."""
        return self._config.guidance_scale(self._base.denoiser.guidance_scale)

    @property
    def reason(self) -> str:
        """Why that step is the best, see :class:`trainer.runs.best_step.Choice`; empty for other results."""
        return self._outcome.reason

    @property
    def trained_steps(self) -> int:
        """The last step that the result could have been; later than the result's own if that was chosen."""
        if self.result is None or self.result.why in (LAST, STOPPED):
            return self.result.step if self.result else 0
        kept = [step for step in self.folder.kept_steps() if step <= self.result.steps]
        return max([self.result.step, *kept])

    def validations(self, steps: int) -> tuple[list[tuple[int, torch.Tensor]], list[int]]:
        """Validations up to ``steps`` with the current prompts and sampling settings.

        Returns:
            the validations, see :meth:`RunFolder.validations`, and the steps whose images are due but missing or drawn
            with other prompts or sampling settings.
        """
        sampling = self._config.validation_steps, self.guidance_scale
        found = self.folder.validations(steps, self.validation_prompts, sampling)
        available = {step for step, _ in found}
        due = [step for step in range(1, steps + 1) if self._config.validation_is_due(step)]
        return found, [step for step in due if step not in available]

    def events(
        self, force_retrain: bool = False, resume_stopped: bool = False, use_step: int = 0
    ) -> Generator[Event, None, None]:
        """Train, or return the existing result.

        However the iteration ends (the generator is closed to cancel, an error is raised, memory runs out), progress is
        saved as a checkpoint and an adapter, from which the same run resumes.

        Args:
            force_retrain: start from step 0 even if the run is finished or has a checkpoint.
            resume_stopped: resume a run that was stopped and kept, up to its planned steps.
            use_step: make the adapter of this step the result, in place of the run's own, without training; 0: off.

        Yields:
            The events of :meth:`trainer.learn.loop.Training.events`, :class:`CheckpointSaved`, :class:`Scores` of
            the evaluator if there is one, and :class:`Finished` last.

        Raises:
            SubjectBoothError: training failed, or the folder cannot be read or written or is locked by another
                program; or the run does not keep the adapter of ``use_step``.
        """
        if use_step:
            yield from self._use_step(use_step, force_retrain)
            return
        self._check_processes()
        self._outcome.record_choice(0)
        done = current().from_main(lambda: None if force_retrain else self._outcome.find_finished(resume_stopped))
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
                    if self._evaluator is not None and not isinstance(event, (Scores, Finished)):
                        yield from self._log_scores(self._evaluator, event)

    def _use_step(self, step: int, force_retrain: bool) -> Iterator[Event]:
        if force_retrain:
            raise SubjectBoothError(
                f"force_retrain together with use_step {step}",
                "one of them: a chosen step is not trained again",
                "set use_step to 0, or force_retrain to false",
                "use_step",
            )
        lora = current().from_main(lambda: chosen_lora(self.folder, step, self._config.steps))
        self._outcome.record_choice(step)
        for note in self.folder.notes:
            yield Adjusted(step, note, {})
        yield self._finish(Result(step, self._config.steps, CHOSEN), lora, trained=False)

    def _run_training(self, force_retrain: bool, resume_stopped: bool) -> Generator[Event, None, None]:
        steps = self._config.steps
        started = self.writer.open(
            {
                "config": self._config.to_json(),
                "trigger": self._subject.trigger,
                "base": base_name(self._base.denoiser.metadata),
                "preservation": self._preservation.name,
                **self._preservation.record,
            }
        )
        resume, is_kept = current().from_main(lambda: self._found(force_retrain))
        for note in self.folder.notes:
            yield Adjusted(resume.step if resume else 0, note, resume.chosen if resume else {})
        if is_kept and not resume_stopped:
            self._stop.set()  # the kept adapter is missing or damaged: restore it from the checkpoint
        self.writer.truncate_events(resume.step if resume else 0, resume.losses if resume else ())
        studied = self.folder.load_studied() if resume and self._preservation.study_images else None
        training = self._training(self.validation_prompts, resume, studied)
        with training:
            yield from self._train_and_save(training, started)
            step, chosen = training.step, training.chosen
        result = current().from_main(
            lambda: self._outcome.of_finished() if step == steps else Result(step, steps, STOPPED)
        )
        self.writer.write_result(result)
        finished = self._finish(result, self.folder.lora_path(result.step), trained=True)
        if finished.warning:
            warning = Adjusted(step, finished.warning, chosen.as_settings())
            self.writer.log(warning)
            yield warning
        yield finished

    def _found(self, force_retrain: bool) -> tuple[Checkpoint | None, bool]:
        """The checkpoint to resume from, and whether it is that of a run that was stopped and kept."""
        if force_retrain:  # a writer that writes nothing has not removed the old one
            return None, False
        steps = self._config.steps
        found = self.folder.load_checkpoint(steps, self.writer.set_checkpoint_aside)
        return found, found is not None and found.step == self.folder.kept_step(steps)

    def _check_processes(self) -> None:
        found = current().exchange(self.folder.key)
        different = [number for number, key in enumerate(found) if key != found[0]]
        if different:
            raise SubjectBoothError(
                f"process {different[0] + 1} has other photos, class images, settings or another base than process 1",
                "the same on all machines",
                "copy them to the same paths",
                "accelerate launch",
            )

    def _training(
        self,
        validation_prompts: tuple[str, ...],
        resume: Checkpoint | None,
        studied: Mapping[str, torch.Tensor] | None = None,
    ) -> Training:
        data = encode(
            self._base,
            self._subject,
            self._preservation,
            self._prepared,
            self.validation_prompts,
            self._encodings,
            self._device,
        )
        scores = self.folder.scores(resume.step) if resume else {}
        return Training(
            self._base,
            data,
            self._config,
            validation_prompts,
            resume,
            self._device,
            self._free,
            studied=studied,
            scored=[step for step, values in scores.items() if PHOTO_LOSS in values],  # others are the evaluator's
        )

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
        adapter_step = 0  # step of the last written adapter
        studied = training.studied
        try:
            for event in training.events():
                if isinstance(event, Started):
                    event = replace(event, notes=(*self.warnings, *event.notes))
                if training.studied is not None and training.studied is not studied:
                    studied = training.studied
                    self.writer.save_studied(studied)
                if not isinstance(event, ValidationStep | Studying):
                    self.writer.log(event)
                yield event
                if self._stop.is_set() and 0 < training.step < self._config.steps:
                    if adapter_step != training.step:
                        self._save_lora(training, started)
                    if saved_step != training.step:
                        self._save_checkpoint(training)
                    saved_step = training.step
                    return
                if not isinstance(event, StepDone):
                    continue
                if self._config.step_is_kept(event.step):
                    self._save_lora(training, started)
                    adapter_step = training.step
                # A step with validation images is saved before sampling, which runs on the averaged weights.
                if (
                    adapter_step == training.step
                    or self._config.validation_is_due(event.step)
                    or time.monotonic() - saved_at >= self._config.checkpoint_seconds
                ):
                    self._save_checkpoint(training)
                    saved_step, saved_at = training.step, time.monotonic()
                    yield CheckpointSaved(training.step, self.folder.checkpoint_path)
            # If all steps were already done but the adapter is missing or damaged, restore it from the checkpoint.
            if self.folder.finished_lora(self._config.steps) is None:
                self._save_lora(training, started)
        finally:
            if training.is_built and training.step and current().is_main:
                self._save_last(training, started, has_checkpoint=training.step == saved_step)

    def _save_last(self, training: Training, started: float, has_checkpoint: bool) -> None:
        """Save what is missing when a cancel or an error ends the run. A failure here is only logged, so that it does
        not hide the original error."""
        try:
            if has_checkpoint and self.folder.lora_path(training.step).is_file():
                return
            self._save_lora(training, started)
            if not has_checkpoint:
                self._save_checkpoint(training)
        except Exception as error:
            logger.error("the steps since the last checkpoint are lost: %s", error)
            return
        if self.folder.lora_path(training.step).is_file():
            logger.info("kept %d of %d steps in %s", training.step, self._config.steps, self.folder.path)

    def _save_checkpoint(self, training: Training) -> None:
        if current().is_main:
            self.writer.save_checkpoint(training.snapshot())

    def _save_lora(self, training: Training, started: float) -> None:
        if not current().is_main:
            return
        tensors = Serialized.of(training.lora())
        metadata = lora_metadata(
            tensors.body_hash(),
            self._subject,
            self._base,
            self._config,
            step=training.step,
            run_key=self.folder.key,
            started=started,
            preservation={"subjectbooth.preservation": self._preservation.name, **self._preservation.metadata},
            chosen=training.chosen,
            buckets=self._prepared.buckets,
        )
        self.writer.write_lora(training.step, tensors, metadata)


def _untrained_warning(lora: Path, step: int) -> str:
    """A warning if all weights of the adapter are still zero, otherwise empty."""
    if not lora.is_file() or not is_untrained(lora):
        return ""
    return (
        f"This LoRA has learned nothing: after step {step} all of its weights are still zero, so it has no effect. "
        "Check the masks (masked_loss trains only on what they cover), the photos and learning_rate"
    )
