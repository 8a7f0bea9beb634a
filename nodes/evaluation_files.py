"""The files of an evaluation in the output folder, and what the node shows of it."""

from __future__ import annotations

import json
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from PIL import Image

from ..trainer.files.storage import canonical_json, disk_errors, sha256_of, write_atomic
from ..trainer.measure import report
from ..trainer.measure.evaluation import Evaluation
from .host import pack_output_dir

NO_FIGURES = (
    "No figures, as nothing compares the pictures. For drift_class, drift_others, subject, subject_in_scenes, pres, "
    "div and class_is_subject, connect a CLIP or DINOv2 model from Load CLIP Vision to clip_vision."
)


@dataclass(frozen=True)
class SavedEvaluation:
    """An evaluation whose files are written.

    Attributes:
        table: Markdown.
        figures: JSON of the figures, prompts and settings.
        grid: all pictures.
        picture: the file of the grid, next to ``report.md``, ``figures.json`` and ``figures.csv``.
        lines: what the node shows.
    """

    table: str
    figures: str
    grid: Image.Image
    picture: Path
    lines: list[str]

    @classmethod
    def save(cls, evaluation: Evaluation, settings: Mapping[str, Any], notes: Sequence[str]) -> SavedEvaluation:
        """Write the files, each atomically.

        Args:
            settings: what was evaluated and how; ``lora``, its file name, names the folder. Others get another folder.
            notes: for the user.

        Raises:
            SubjectBoothError: the folder cannot be written.
        """
        table = report.markdown(evaluation) if evaluation.figures else f"{NO_FIGURES}\n"
        # Without their meaning, which the table has: the node shows about twelve lines.
        lines = [f"{name} {figure.value:.2f} ± {figure.error:.2f}" for name, figure in evaluation.figures.items()]
        figures = json.dumps({**settings, **json.loads(report.as_json(evaluation))}, indent=1, ensure_ascii=False)
        sheet = report.grid(evaluation)
        about = ", ".join(f"{name} {settings[name]}" for name in settings if name != "lora" and "digest" not in name)
        page = "\n\n".join([f"# {settings['lora']}", table.rstrip(), f"{about}.", *notes, "![grid](grid.png)"])
        folder = _folder(settings, evaluation)
        with disk_errors("the evaluation cannot be saved", folder):
            write_atomic(folder / "report.md", page + "\n")
            write_atomic(folder / "figures.json", figures + "\n")
            write_atomic(folder / "figures.csv", report.as_csv(evaluation))
            write_atomic(folder / "grid.png", lambda path: sheet.save(path))
        shown = [*(lines or [NO_FIGURES]), *evaluation.notes, *notes]
        return cls(table, figures, sheet, folder / "grid.png", shown)


def _folder(settings: Mapping[str, Any], evaluation: Evaluation) -> Path:
    prompts = [row.prompt for row in evaluation.rows]
    key = sha256_of(canonical_json([dict(settings), evaluation.embedder, list(evaluation.seeds), prompts]))
    stem = re.sub(r"[^\w-]+", "_", Path(settings["lora"]).stem).strip("_")[:60]
    return pack_output_dir() / "evaluations" / f"{stem}_{key[:12]}"
