"""Reads a run's folder: settings, log, checkpoints, validation images, adapters and the result.

The folder's name contains the run's key, so the same request finds the same folder. This module only reads; all writes
go through :mod:`trainer.runs.writer`.
"""

from __future__ import annotations

import json
import logging
import re
from collections.abc import Callable
from pathlib import Path

import numpy as np
import torch
from PIL import Image

from ..errors import SubjectBoothError
from ..events import StepDone, Validation
from ..files.safetensors_file import checksum_matches, read_checked, read_metadata
from ..files.storage import disk_errors
from ..learn import checkpoint
from ..learn.checkpoint import Checkpoint
from .log import Entry, read_entries, scores_of
from .result import RESULT_FILE, Result, ResultFile, read_results

logger = logging.getLogger("subjectbooth")

LORA_FILE = re.compile(r"lora_(\d{6,9})\.safetensors")
"""The name of the adapter of a step, see :func:`lora_path`."""


class RunFolder:
    """Read access to the folder of one run.

    Args:
        root: the folder that contains all runs.
        key: the run key, 64 hex digits, from :func:`trainer.config.run_key`.
        label: a readable prefix of the folder's name ("ohwx dog").
    """

    def __init__(self, root: Path, key: str, label: str) -> None:
        words = re.sub(r"[^\w-]+", "_", label).strip("_")[:40]
        self.key = key
        self.path = root / f"{words}_{key[:12]}"
        self.record_path = self.path / "run.json"
        self.log_path = self.path / "events.jsonl"
        self.checkpoint_path = self.path / "checkpoint.safetensors"
        self.grid_path = self.path / "validation" / "grid.png"
        self.studied_path = self.path / "studied.safetensors"
        self.notes: list[str] = []
        """Sentences about damaged files that are rebuilt."""

    def lora_path(self, step: int) -> Path:
        """Path of the adapter of a step, whether or not it exists."""
        return lora_path(self.path, step)

    def finished_lora(self, step: int) -> Path | None:
        """Path of the adapter of a step; None if it is missing or damaged.

        Raises:
            SubjectBoothError: the file cannot be read.
        """
        path = self.lora_path(step)
        if not path.is_file():
            return None
        if not self.lora_is_valid(step):
            logger.warning("%s is damaged and is rebuilt", path)
            self._add_note(f"{path.name} was damaged and is rebuilt")
            return None
        return path

    def lora_is_valid(self, step: int) -> bool:
        """Whether the adapter of a step exists, is undamaged and belongs to this run.

        Raises:
            SubjectBoothError: the file cannot be read.
        """
        path = self.lora_path(step)
        if not path.is_file():
            return False
        with disk_errors("the adapter cannot be read", self.path):  # unreadable does not mean damaged
            content = path.read_bytes()
        try:
            return checksum_matches(content) and read_metadata(path)["subjectbooth.run_key"] == self.key
        except Exception:  # a damaged file can raise anything
            return False

    def kept_steps(self) -> list[int]:
        """The steps that have an adapter, in order; it may be damaged."""
        return saved_steps(self.path)

    def set_aside_path(self, step: int) -> Path:
        """Path for the checkpoint of a longer run while a shorter one writes its own."""
        return self.path / f"checkpoint_{step:06d}.safetensors"

    def load_checkpoint(self, steps: int, set_aside: Callable[[int], None] = lambda step: None) -> Checkpoint | None:
        """The latest valid checkpoint at or before ``steps``; None if there is none.

        Args:
            steps: planned steps.
            set_aside: called with the step of the last checkpoint if that is beyond ``steps``, from a longer run with
                the same settings, because the next save would overwrite it.

        Raises:
            SubjectBoothError: a checkpoint cannot be read.
        """
        found = self._read_checkpoint(self.checkpoint_path)
        if found is not None and found.step > steps:
            set_aside(found.step)
            found = None
        aside = [path for path in self.path.glob("checkpoint_*.safetensors") if path.stem[11:].isdigit()]
        for path in sorted(aside, key=lambda path: int(path.stem[11:]), reverse=True):
            if (found.step if found else 0) < int(path.stem[11:]) <= steps:
                found = self._read_checkpoint(path) or found
        return found

    def resumable_step(self, steps: int) -> int:
        """The step from which a run of ``steps`` steps would resume; 0 if from the start.

        Cheap: reads only the headers of the checkpoints, so a damaged one counts too.
        """
        asides = [path.stem[11:] for path in self.path.glob("checkpoint_*.safetensors")]
        found = [int(step) for step in asides if step.isdigit()]
        try:
            found.append(int(json.loads(read_metadata(self.checkpoint_path)["state"])["step"]))
        except (OSError, SubjectBoothError, ValueError, TypeError, KeyError):  # missing or damaged
            pass
        return max((step for step in found if step <= steps), default=0)

    def _read_checkpoint(self, path: Path) -> Checkpoint | None:
        # An unreadable checkpoint (opened by another program, drive unplugged) may be valid and must not be replaced.
        with disk_errors("the checkpoint cannot be read", self.path):
            try:
                return checkpoint.load(path)
            except FileNotFoundError:
                return None
            except SubjectBoothError as error:
                logger.warning("%s", error)
                self._add_note(f"{path.name} cannot be used ({error.given}): the run resumes without it")
                return None

    def load_studied(self) -> dict[str, torch.Tensor] | None:
        """What class preservation learned about the base; None if it is missing or damaged, and is learned again.

        Raises:
            SubjectBoothError: the file cannot be read.
        """
        with disk_errors("what was learned about the base cannot be read", self.path):
            try:
                return read_checked(self.studied_path)[0]
            except FileNotFoundError:
                return None
            except SubjectBoothError as error:
                logger.warning("%s", error)
                return None

    def results(self) -> ResultFile:
        """The content of ``result.json``. If it is damaged, that is reported, and it is rebuilt from the adapters.

        Raises:
            SubjectBoothError: the file cannot be read.
        """
        with disk_errors("the run's result cannot be read", self.path):
            found = read_results(self.path)
        if found.is_damaged:
            logger.warning("%s is damaged and is rebuilt", self.path / RESULT_FILE)
            self._add_note(f"{RESULT_FILE} was damaged and is rebuilt from the adapters")
        return found

    def result(self, steps: int) -> Result | None:
        """The result for a run of ``steps`` steps; None if there is none yet.

        Each number of steps is a separate request with its own result.
        """
        return self.results().results.get(steps)

    def kept_step(self, steps: int) -> int | None:
        """The step at which a run of ``steps`` steps was stopped and kept; None if it was not."""
        found = self.result(steps)
        return found.step if found is not None and found.is_stopped else None

    def validation_paths(self, step: int, count: int) -> list[Path]:
        """Paths of the validation images of a step, whether or not they exist."""
        return [self.path / "validation" / f"step_{step:06d}_{number:02d}.png" for number in range(count)]

    def validations(
        self,
        steps: int,
        prompts: tuple[str, ...],
        sampling: tuple[int, float] | None = None,
    ) -> list[tuple[int, torch.Tensor]]:
        """The validations up to ``steps`` that match, as pairs of step and images (float32 [n, h, w, 3] in 0..1).

        Prompts and sampling settings are not part of the run's key, so existing images may have others.

        Args:
            steps: the last step.
            prompts: the prompts to match.
            sampling: sampling steps and guidance scale to match; None matches any. Earlier versions did not log them;
                their images match as well.
        """
        found: dict[int, torch.Tensor] = {}
        for values in self.entries():
            if values["event"] != Validation.__name__ or values["step"] > steps:
                continue
            try:
                step, drawn = values["step"], tuple(str(prompt) for prompt in values["prompts"])
                found.pop(step, None)
                settings = values.get("sampling_steps"), values.get("guidance_scale")
                if drawn == prompts and (sampling is None or settings in (sampling, (None, None))):
                    images = [_read_image(path) for path in self.validation_paths(step, len(prompts))]
                    found[step] = torch.from_numpy(np.stack(images))
            except (OSError, ValueError, TypeError, KeyError, SyntaxError):  # missing or damaged (SyntaxError is PIL's)
                continue
        return sorted(found.items())

    def losses(self, steps: int) -> list[float]:
        """The losses of all logged steps up to ``steps``."""
        return [
            values["loss"]
            for values in self.entries()
            if values["event"] == StepDone.__name__
            and values["step"] <= steps
            and isinstance(values.get("loss"), float)
        ]

    def scores(self, steps: int) -> dict[int, dict[str, float]]:
        """The logged scores up to ``steps``, by step and name; step 0 is the base."""
        return scores_of(self.entries(), steps)

    def entries(self) -> list[Entry]:
        """All log entries.

        Raises:
            SubjectBoothError: the log cannot be read.
        """
        with disk_errors("the run's log cannot be read", self.path):
            return read_entries(self.log_path)

    def _add_note(self, sentence: str) -> None:
        if sentence not in self.notes:
            self.notes.append(sentence)


def lora_path(folder: Path, step: int) -> Path:
    """Path of the adapter of a step in a run's folder."""
    return folder / f"lora_{step:06d}.safetensors"


def saved_steps(folder: Path) -> list[int]:
    """The steps that have an adapter in a run's folder, in order."""
    return sorted(int(found[1]) for path in folder.glob("lora_*") if (found := LORA_FILE.fullmatch(path.name)))


def _read_image(path: Path) -> np.ndarray:
    """float32 [h, w, 3] in 0..1."""
    with Image.open(path) as image:
        return np.asarray(image.convert("RGB"), dtype=np.float32) / 255
