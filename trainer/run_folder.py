"""A run is a folder: settings, events, the last checkpoint, validation pictures and the adapter at each finished step.

The folder is named by the run's key, so that the same request finds it again.
"""

from __future__ import annotations

import json
import logging
import re
import time
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image

from . import checkpoint
from .checkpoint import Checkpoint
from .errors import SubjectBoothError
from .events import Event, StepDone, Validation, to_json
from .safefile import body_hash, read_metadata, to_bytes
from .storage import write_atomic

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

    def open(self, settings: dict[str, Any]) -> float:
        """Make the folder, or find it again; returns the Unix time of its first opening.

        Raises:
            OSError: the folder cannot be written.
        """
        record = self.path / "run.json"
        try:
            started = float(json.loads(record.read_text("utf-8"))["started"])
        except (FileNotFoundError, ValueError, KeyError, TypeError):
            started = float(int(time.time()))
        write_atomic(record, json.dumps({"key": self.key, "started": started, **settings}, indent=1,
                                        ensure_ascii=False))
        return started

    def lora_path(self, step: int) -> Path:
        """Where the adapter of that step lies, or would lie."""
        return self.path / f"lora_{step:06d}.safetensors"

    def finished_lora(self, step: int) -> Path | None:
        """The whole and undamaged adapter of that step, None when it is not there."""
        path = self.lora_path(step)
        if not path.is_file():
            return None
        try:
            metadata = read_metadata(path)
            import safetensors.torch

            whole = body_hash(safetensors.torch.load(path.read_bytes())) == metadata["sshs_model_hash"]
        except Exception:  # whatever a damaged file does to its reader
            whole = False
        if not whole or metadata.get("subjectbooth.run_key") != self.key:
            logger.warning("%s is damaged and is made anew", path)
            return None
        return path

    def write_lora(self, step: int, tensors: dict[str, torch.Tensor], metadata: dict[str, str]) -> Path:
        """Write the adapter of that step."""
        write_atomic(self.lora_path(step), to_bytes(tensors, metadata))
        return self.lora_path(step)

    def save_checkpoint(self, state: Checkpoint) -> Path:
        """Replace the last checkpoint."""
        checkpoint.save(self._checkpoint, state)
        return self._checkpoint

    def load_checkpoint(self, steps: int) -> Checkpoint | None:
        """The last checkpoint, when it is whole and not beyond ``steps``."""
        try:
            found = checkpoint.load(self._checkpoint)
        except FileNotFoundError:
            return None
        except SubjectBoothError as error:
            logger.warning("%s The run starts from step 0.", error)
            return None
        return found if found.step <= steps else None

    def forget(self) -> None:
        """Before a forced second training: the state of the first is in the way, its adapters are not."""
        self._checkpoint.unlink(missing_ok=True)

    def truncate_events(self, step: int) -> None:
        """Drop the lines of steps after the checkpoint that the run goes on from."""
        lines = []
        if self._events.is_file():
            for line in self._events.read_text("utf-8").splitlines():
                try:
                    if json.loads(line)["step"] <= step and step > 0:
                        lines.append(line)
                except (ValueError, KeyError, TypeError):
                    continue  # the line that was being written when the program was killed
        self.path.mkdir(parents=True, exist_ok=True)
        write_atomic(self._events, "".join(f"{line}\n" for line in lines))

    def log(self, event: Event) -> None:
        """Append the event; validation pictures are written as PNG beside the log."""
        if isinstance(event, Validation):
            for path, image in zip(self.pictures(event.step, len(event.prompts)), event.images, strict=True):
                picture = Image.fromarray((image.clamp(0, 1) * 255).round().to(torch.uint8).numpy())
                write_atomic(path, picture.save)
        with self._events.open("a", encoding="utf-8") as file:
            file.write(json.dumps(to_json(event), ensure_ascii=False) + "\n")

    def pictures(self, step: int, count: int) -> list[Path]:
        """Where the validation pictures of a step lie."""
        return [self.path / "validation" / f"step_{step:06d}_{number:02d}.png" for number in range(count)]

    def validations(self, steps: int) -> list[tuple[int, tuple[str, ...], torch.Tensor]]:
        """Step, prompts and pictures (float32 [n, h, w, 3]) of every validation up to ``steps`` that is still there."""
        found: dict[int, tuple[int, tuple[str, ...], torch.Tensor]] = {}
        for values in self._logged("Validation"):
            step, prompts = values["step"], tuple(values["prompts"])
            paths = self.pictures(step, len(prompts))
            if step <= steps and all(path.is_file() for path in paths):
                images = [np.asarray(Image.open(path).convert("RGB"), dtype=np.float32) / 255 for path in paths]
                found[step] = (step, prompts, torch.from_numpy(np.stack(images)))
        return [found[step] for step in sorted(found)]

    def losses(self, steps: int) -> list[float]:
        """The loss of every step up to ``steps``."""
        return [values["loss"] for values in self._logged(StepDone.__name__) if values["step"] <= steps]

    def _logged(self, kind: str) -> list[dict[str, Any]]:
        if not self._events.is_file():
            return []
        values = []
        for line in self._events.read_text("utf-8").splitlines():
            try:
                entry = json.loads(line)
            except ValueError:
                continue
            if entry.get("event") == kind:
                values.append(entry)
        return values
