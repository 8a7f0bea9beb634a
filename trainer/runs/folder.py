"""A run is a folder: settings, events, the last checkpoint, validation pictures and the adapter at each finished step.

The folder is named by the run's key, so that the same request finds it again.
"""

from __future__ import annotations

import datetime
import json
import logging
import re
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image

from ..errors import SubjectBoothError
from ..events import Event, StepDone, Validation, to_json
from ..files.safetensors_file import checksum_matches, read_metadata, to_bytes_with_checksum
from ..files.storage import disk_errors, remove_temp_files, rename, write_atomic
from ..learn import checkpoint
from ..learn.checkpoint import Checkpoint

logger = logging.getLogger("subjectbooth")


class RunFolder:
    """The files of one run.

    Args:
        root: the folder that holds all runs.
        key: 64 hex digits, from :func:`trainer.config.run_key`.
        label: a few words for people who look into the folder ("ohwx dog").
    """

    def __init__(self, root: Path, key: str, label: str) -> None:
        words = re.sub(r"[^\w-]+", "_", label).strip("_")[:40]
        self.key = key
        self.path = root / f"{words}_{key[:12]}"
        self._events = self.path / "events.jsonl"
        self._checkpoint = self.path / "checkpoint.safetensors"
        self._kept = self.path / "kept.json"
        self.notes: list[str] = []
        """Sentences about what was found damaged, and made anew."""

    def open(self, settings: dict[str, Any]) -> float:
        """Make the folder, or find it again; returns the Unix time of its first opening. Only for who owns it.

        Raises:
            SubjectBoothError: the folder cannot be written.
        """
        record = self.path / "run.json"
        try:
            started = float(int(json.loads(record.read_text("utf-8"))["started"]))
            datetime.datetime.fromtimestamp(started, datetime.timezone.utc)
        except (OSError, ValueError, KeyError, TypeError, OverflowError, RecursionError):
            started = float(int(time.time()))
        with disk_errors("the run's folder cannot be written", self.path):
            for folder in (self.path, self.path / "validation"):
                remove_temp_files(folder)
            write_atomic(
                record, json.dumps({"key": self.key, "started": started, **settings}, indent=1, ensure_ascii=False)
            )
        return started

    def lora_path(self, step: int) -> Path:
        """Where the adapter of that step lies, or would lie."""
        return self.path / f"lora_{step:06d}.safetensors"

    def finished_lora(self, step: int) -> Path | None:
        """The whole and undamaged adapter of that step, None when it is not there."""
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
            logger.warning("%s is damaged and is made anew", path)
            self._note(f"{path.name} was damaged and is made anew")
            return None
        return path

    def write_lora(self, step: int, tensors: dict[str, torch.Tensor], metadata: dict[str, str]) -> Path:
        """Write the adapter of that step."""
        with disk_errors("the adapter cannot be saved", self.path):
            write_atomic(self.lora_path(step), to_bytes_with_checksum(tensors, metadata))
        return self.lora_path(step)

    def save_checkpoint(self, state: Checkpoint) -> Path:
        """Replace the last checkpoint."""
        with disk_errors("the checkpoint cannot be saved", self.path):
            checkpoint.save(self._checkpoint, state)
        return self._checkpoint

    def load_checkpoint(self, steps: int) -> Checkpoint | None:
        """The last whole checkpoint that is not beyond ``steps``.

        One that is beyond, of a longer run of the same settings, is put aside: asked for more steps again, the run
        goes on from there.
        """
        found = self._read_checkpoint(self._checkpoint)
        if found is not None and found.step > steps:
            with disk_errors("the checkpoint of a longer run cannot be put aside", self.path):
                rename(self._checkpoint, self.path / f"checkpoint_{found.step:06d}.safetensors")
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
                self._note(f"{path.name} cannot be used ({error.given}): the run goes on from what is left")
                return None

    def forget(self) -> None:
        """Before a forced second training: the state of the first is in the way, its adapters are not."""
        with disk_errors("what is left of the training before cannot be removed", self.path):
            for path in self.path.glob("checkpoint*.safetensors"):
                path.unlink()
        self.revoke()

    def keep(self, step: int, steps: int) -> None:
        """Remember that the user takes the adapter of ``step`` for the result of the run of ``steps``."""
        with disk_errors("the stop at this step cannot be saved", self.path):
            write_atomic(self._kept, json.dumps({"step": step, "steps": steps}))

    def kept_step(self, steps: int) -> int | None:
        """The step at which a run of that many steps was stopped and kept.

        Asking for another number of steps is a new wish, to which what was kept is no answer.
        """
        try:
            values = json.loads(self._kept.read_text("utf-8"))
            step = values["step"]
            return step if values["steps"] == steps and isinstance(step, int) and 0 < step < steps else None
        except (OSError, ValueError, KeyError, TypeError, RecursionError):
            return None

    def revoke(self) -> None:
        """Before a run goes on that was stopped and kept."""
        with disk_errors("the mark of the stop cannot be removed", self.path):
            self._kept.unlink(missing_ok=True)

    def record_result(self, values: dict[str, Any]) -> None:
        """Note what came of the run, as plain JSON values, for whoever looks at it later."""
        with disk_errors("the run's result cannot be noted", self.path):
            write_atomic(self.path / "result.json", json.dumps(values, indent=1, ensure_ascii=False))

    def truncate_events(self, step: int, losses: Sequence[Mapping[str, float]] = ()) -> None:
        """Drop the lines of steps after the checkpoint that the run goes on from, and write those that are missing.

        Args:
            step: the checkpoint's.
            losses: of each of its steps; the log is appended to without a flush to the disk, so a power cut can cost
                some of its lines.
        """
        kept = [entry for entry in self._logged() if entry["step"] <= step and step > 0]
        there = {entry["step"] for entry in kept if entry["event"] == StepDone.__name__}
        for number, values in enumerate(losses[:step], start=1):
            if number not in there:
                kept.append({"event": StepDone.__name__, "step": number, **values})
        if len(there) < step:
            kept.sort(key=lambda entry: entry["step"])
        with disk_errors("the run's log cannot be written", self.path):
            write_atomic(self._events, "".join(json.dumps(entry, ensure_ascii=False) + "\n" for entry in kept))

    def log(self, event: Event) -> None:
        """Append the event; validation pictures are written as PNG beside the log."""
        with disk_errors("the run's log cannot be written", self.path):
            if isinstance(event, Validation):
                for path, image in zip(self.pictures(event.step, len(event.prompts)), event.images, strict=True):
                    picture = Image.fromarray((image.clamp(0, 1) * 255).round().to(torch.uint8).numpy())
                    write_atomic(path, picture.save)
            with self._events.open("a", encoding="utf-8") as file:
                file.write(json.dumps(to_json(event), ensure_ascii=False) + "\n")

    def pictures(self, step: int, count: int) -> list[Path]:
        """Where the validation pictures of a step lie."""
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
        for values in self._logged():
            if values["event"] != Validation.__name__ or values["step"] > steps:
                continue
            try:
                step, drawn = values["step"], tuple(str(prompt) for prompt in values["prompts"])
                found.pop(step, None)
                settings = values.get("sampling_steps"), values.get("guidance_scale")
                if drawn == prompts and (sampling is None or settings in (sampling, (None, None))):
                    images = [_read_picture(path) for path in self.pictures(step, len(prompts))]
                    found[step] = torch.from_numpy(np.stack(images))
            except (OSError, ValueError, TypeError, KeyError, SyntaxError):  # gone or damaged (PIL says the last)
                continue
        return sorted(found.items())

    def losses(self, steps: int) -> list[float]:
        """The loss of every step up to ``steps``."""
        return [
            values["loss"]
            for values in self._logged()
            if values["event"] == StepDone.__name__
            and values["step"] <= steps
            and isinstance(values.get("loss"), float)
        ]

    def _note(self, sentence: str) -> None:
        if sentence not in self.notes:
            self.notes.append(sentence)

    def _logged(self) -> list[dict[str, Any]]:
        """The log's entries; a line that a kill or the disk has spoilt is left out."""
        with disk_errors("the run's log cannot be read", self.path):
            if not self._events.is_file():
                return []
            lines = self._events.read_text("utf-8", errors="replace").split("\n")
        entries = []
        for line in lines:
            try:
                entry = json.loads(line)
                if isinstance(entry["step"], int) and isinstance(entry["event"], str):
                    entries.append(entry)
            except (ValueError, KeyError, TypeError, RecursionError):
                continue
        return entries


def _read_picture(path: Path) -> np.ndarray:
    """float32 [h, w, 3] in 0..1."""
    with Image.open(path) as image:
        return np.asarray(image.convert("RGB"), dtype=np.float32) / 255
