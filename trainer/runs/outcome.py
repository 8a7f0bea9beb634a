"""Which step of a run's folder is its result: an existing one, the best, the last, or the one that the user chose."""

from __future__ import annotations

from contextlib import suppress
from pathlib import Path

from ..config import TrainConfig
from ..errors import SubjectBoothError
from ..files.storage import disk_errors
from .best_step import best_step
from .folder import RunFolder
from .result import BEST, LAST, Result
from .writer import RunWriter


class Outcome:
    """Finds and records the result of a run.

    Args:
        folder: the run's folder.
        writer: writes to it.
        config: uses steps and keep.

    Attributes:
        reason: why the step is the best, see :class:`trainer.runs.best_step.Choice`; empty for other results.
    """

    def __init__(self, folder: RunFolder, writer: RunWriter, config: TrainConfig) -> None:
        self._folder, self._writer, self._config = folder, writer, config
        self.reason = ""

    def record_choice(self, step: int) -> None:
        """Record the user's choice in ``result.json``, if it is new. Skipped if the folder is locked or read-only."""
        steps = self._config.steps
        with suppress(SubjectBoothError):
            if self._folder.results().chosen.get(steps, 0) != step:
                with self._writer.lock():
                    self._writer.choose_step(steps, step)

    def find_finished(self, resume_stopped: bool) -> tuple[Result, Path] | None:
        """The existing result and its adapter; None if training is needed."""
        steps = self._config.steps
        with disk_errors("the run's folder cannot be read", self._folder.path):
            known = self._folder.results()
            written = known.results.get(steps)
            result: Result | None = None
            # A finished run that was retrained and stopped has both results; the last step serves as fallback.
            is_own = written is None or written.why in (LAST, BEST)
            if written is not None and not is_own and not (resume_stopped and written.is_stopped):
                result = written if self._folder.finished_lora(written.step) else None
            if result is None and self._folder.finished_lora(steps):
                result = self.of_finished()
            if result is None:
                return None
            if known.is_damaged or (is_own and written != result):
                self._rebuild_result(result)
            return result, self._folder.lora_path(result.step)

    def of_finished(self) -> Result:
        """The result of a run that has completed all its steps, by ``keep``."""
        steps = self._config.steps
        if self._config.keep == "best":
            scores, kept = self._folder.scores(steps), set(self._folder.kept_steps())
            while (choice := best_step(scores, kept)) is not None:
                if self._folder.lora_is_valid(choice.step):
                    self.reason = choice.reason
                    return Result(choice.step, steps, BEST)
                kept.remove(choice.step)
        return Result(steps, steps, LAST)

    def _rebuild_result(self, result: Result) -> None:
        """Write the result of a finished run if it is missing, damaged or of another ``keep``. Skipped if the folder is
        locked or read-only, because reusing a run does not require write access."""
        with suppress(SubjectBoothError), self._writer.lock():
            self._writer.write_result(result)
