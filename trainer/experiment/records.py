"""What was measured of a run at a step, on disk: figures and pictures under a name made from the run's key."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from PIL import Image

from ..files.storage import disk_errors, write_atomic

FIGURES_FILE = "figures.json"


@dataclass(frozen=True)
class Record:
    """A measured step of a run.

    Attributes:
        run: name of the run's folder.
        key: of the run.
        step: whose LoRA was measured; earlier than the last if ``keep`` is best.
        figures: by name.
        notes: what was left out, and why.
        pictures: files, one per prompt; those of the base follow.
    """

    run: str
    key: str
    step: int
    figures: Mapping[str, float]
    notes: tuple[str, ...]
    pictures: tuple[Path, ...]


class Records:
    """The records in a folder, one folder each. The figures are written last, so a record is whole or missing.

    Args:
        folder: for all records.
    """

    def __init__(self, folder: Path) -> None:
        self.folder = folder

    def read(self, name: str) -> Record | None:
        """A record; None if it is missing or damaged."""
        path = self.folder / name
        try:
            values: dict[str, Any] = json.loads((path / FIGURES_FILE).read_text("utf-8"))
            pictures = tuple(path / file for file in values["pictures"])
            record = Record(
                values["run"],
                values["key"],
                values["step"],
                {str(name): float(value) for name, value in values["figures"].items()},
                tuple(map(str, values["notes"])),
                pictures,
            )
        except (OSError, ValueError, KeyError, TypeError, AttributeError):
            return None
        return record if all(picture.is_file() for picture in pictures) else None

    def write(
        self,
        name: str,
        *,
        run: str,
        key: str,
        step: int,
        figures: Mapping[str, float],
        notes: Sequence[str],
        pictures: Sequence[Image.Image],
    ) -> None:
        """Write a record.

        Raises:
            SubjectBoothError: a file cannot be written.
        """
        folder = self.folder / name
        files = [f"{number:02d}.png" for number in range(len(pictures))]
        values = {
            "run": run,
            "key": key,
            "step": step,
            "figures": dict(figures),
            "notes": list(notes),
            "pictures": files,
        }
        with disk_errors("the figures of a run cannot be written", folder):
            for file, picture in zip(files, pictures, strict=True):
                write_atomic(folder / file, picture.save)
            write_atomic(folder / FIGURES_FILE, json.dumps(values, indent=1, ensure_ascii=False) + "\n")
