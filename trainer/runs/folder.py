"""A run is a folder: settings, log, the last checkpoint, validation pictures, the adapters, and which of them counts.

The folder is named by the run's key, so that the same request finds it again. Here it is only read; everything that is
written goes through :mod:`trainer.runs.writer`.
"""

from __future__ import annotations

import logging
import re
from collections.abc import Callable
from pathlib import Path

import numpy as np
import torch
from PIL import Image

from ..errors import SubjectBoothError
from ..events import StepDone, Validation
from ..files.safetensors_file import checksum_matches, read_metadata
from ..files.storage import disk_errors
from ..learn import checkpoint
from ..learn.checkpoint import Checkpoint
from .log import Entry, read_entries
from .result import RESULT_FILE, Result, ResultFile, read_results

logger = logging.getLogger("subjectbooth")


class RunFolder:
    """What is in the folder of one run.

    Args:
        root: the folder that holds all runs.
        key: 64 hex digits, from :func:`trainer.config.run_key`.
        label: a few words for people who look into the folder ("ohwx dog").
    """

    def __init__(self, root: Path, key: str, label: str) -> None:
        words = re.sub(r"[^\w-]+", "_", label).strip("_")[:40]
        self.key = key
        self.path = root / f"{words}_{key[:12]}"
        self.record_path = self.path / "run.json"
        self.log_path = self.path / "events.jsonl"
        self.checkpoint_path = self.path / "checkpoint.safetensors"
        self.notes: list[str] = []
        """Sentences about what was found damaged, and is rebuilt."""

    def lora_path(self, step: int) -> Path:
        """The path of the adapter of that step, whether or not it exists."""
        return self.path / f"lora_{step:06d}.safetensors"

    def finished_lora(self, step: int) -> Path | None:
        """The whole and undamaged adapter of that step, None if there is none."""
        path = self.lora_path(step)
        if not path.is_file():
            return None
        with disk_errors("the adapter cannot be read", self.path):  # which does not say that it is damaged
            content = path.read_bytes()
        try:
            whole = checksum_matches(content) and read_metadata(path)["subjectbooth.run_key"] == self.key
        except Exception:  # whatever a damaged file does to its reader
            whole = False
        if not whole:
            logger.warning("%s is damaged and is rebuilt", path)
            self._add_note(f"{path.name} was damaged and is rebuilt")
            return None
        return path

    def set_aside_path(self, step: int) -> Path:
        """Where the checkpoint of a longer run is kept while a shorter one writes its own."""
        return self.path / f"checkpoint_{step:06d}.safetensors"

    def load_checkpoint(self, steps: int, set_aside: Callable[[int], None] = lambda step: None) -> Checkpoint | None:
        """The last whole checkpoint that is not beyond ``steps``.

        Args:
            steps: how many are planned.
            set_aside: called with its step if the last checkpoint is beyond, of a longer run of the same settings: the
                next one that is saved would replace it.
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

    def _read_checkpoint(self, path: Path) -> Checkpoint | None:
        # One that cannot be read now (another program has it, the drive is away) may be whole: nothing replaces it.
        with disk_errors("the checkpoint cannot be read", self.path):
            try:
                return checkpoint.load(path)
            except FileNotFoundError:
                return None
            except SubjectBoothError as error:
                logger.warning("%s", error)
                self._add_note(f"{path.name} cannot be used ({error.given}): the run goes on from what is left")
                return None

    def results(self) -> ResultFile:
        """What ``result.json`` says. If it is damaged, that is reported, and the adapters say what is left."""
        with disk_errors("the run's result cannot be read", self.path):
            found = read_results(self.path)
        if found.is_damaged:
            logger.warning("%s is damaged and is rebuilt", self.path / RESULT_FILE)
            self._add_note(f"{RESULT_FILE} was damaged and is rebuilt from the adapters")
        return found

    def result(self, steps: int) -> Result | None:
        """The result of a run of that many steps, None if there is none yet.

        Asking for another number of steps is another request, to which the step of this one is no answer.
        """
        return self.results().results.get(steps)

    def kept_step(self, steps: int) -> int | None:
        """The step at which a run of that many steps was stopped and kept."""
        found = self.result(steps)
        return found.step if found is not None and found.is_stopped else None

    def validation_paths(self, step: int, count: int) -> list[Path]:
        """The paths of the validation pictures of a step."""
        return [self.path / "validation" / f"step_{step:06d}_{number:02d}.png" for number in range(count)]

    def validations(
        self,
        steps: int,
        prompts: tuple[str, ...],
        sampling: tuple[int, float] | None = None,
    ) -> list[tuple[int, torch.Tensor]]:
        """Step and pictures (float32 [n, h, w, 3]) of every validation of these prompts up to ``steps`` that is there.

        Neither prompts nor sampling settings are in the run's key: pictures may have been drawn with others.

        Args:
            sampling: sampling steps and guidance scale; None takes pictures of any. Runs of before these were logged
                count as drawn with them.
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
            except (OSError, ValueError, TypeError, KeyError, SyntaxError):  # gone or damaged (PIL raises the last)
                continue
        return sorted(found.items())

    def losses(self, steps: int) -> list[float]:
        """The loss of every step up to ``steps``."""
        return [
            values["loss"]
            for values in self.entries()
            if values["event"] == StepDone.__name__
            and values["step"] <= steps
            and isinstance(values.get("loss"), float)
        ]

    def entries(self) -> list[Entry]:
        """The log's entries."""
        with disk_errors("the run's log cannot be read", self.path):
            return read_entries(self.log_path)

    def _add_note(self, sentence: str) -> None:
        if sentence not in self.notes:
            self.notes.append(sentence)


def _read_image(path: Path) -> np.ndarray:
    """float32 [h, w, 3] in 0..1."""
    with Image.open(path) as image:
        return np.asarray(image.convert("RGB"), dtype=np.float32) / 255
