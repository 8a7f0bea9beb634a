"""Logs the page of a grid to TensorBoard or Weights & Biases: the table, a row for each run, and the pictures."""

from __future__ import annotations

import importlib.util
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np

from ..experiment.page import Page
from ..experiment.spec import Spec
from ..experiment.table import markdown
from ..files.storage import sha256_of
from .trackers import WANDB_SETTINGS


def log_page(name: str, page: Page, spec: Spec, folder: Path, warn: Callable[[str], None]) -> None:
    """Log the page. The page itself does not depend on it: whatever fails is one warning.

    Args:
        name: of the tracker; "none" for none.
        folder: of the page; the tracker's files are written to it.
        warn: shows a sentence to the user.
    """
    if name == "none":
        return
    try:
        if importlib.util.find_spec(name) is None:
            raise ModuleNotFoundError(f"the package {name} is not installed")
        {"tensorboard": _to_tensorboard, "wandb": _to_wandb}[name](page, spec, folder)
    except Exception as error:  # a service can fail in any way
        warn(f"the page is not logged to {name} ({type(error).__name__}: {error}); its files are complete")


def _to_tensorboard(page: Page, spec: Spec, folder: Path) -> None:
    from torch.utils.tensorboard import SummaryWriter

    with SummaryWriter(str(folder / "tensorboard")) as writer:
        writer.add_text("table", markdown([axis.name for axis in spec.axes], page.rows, page.figures))
        for sheet in page.sheets:
            writer.add_image(sheet.title, np.asarray(sheet.image), dataformats="HWC")
        for row in page.rows:
            tag = ", ".join([*row.point.labels, f"seed {row.point.seed}"])
            for figure, value in (row.record.figures if row.record else {}).items():
                writer.add_scalar(f"{figure}/{tag}", value, row.point.steps)


def _to_wandb(page: Page, spec: Spec, folder: Path) -> None:
    import wandb

    supported = {key: value for key, value in WANDB_SETTINGS.items() if key in wandb.Settings.model_fields}
    run = wandb.init(
        project="subjectbooth",
        name=f"experiment {spec.name}",
        id=sha256_of(spec.name, page.csv)[:16],
        resume="allow",
        config={"question": spec.question, "seeds": list(spec.seeds)},
        dir=str(folder),
        settings=wandb.Settings(**supported),
    )
    try:
        columns: list[str | int] = [*(axis.name for axis in spec.axes), "seed", "steps", *page.figures, "problem"]
        data: list[list[Any]] = []
        for row in page.rows:
            values = [row.record.figures.get(figure) if row.record else None for figure in page.figures]
            data.append([*row.point.labels, row.point.seed, row.point.steps, *values, row.problem])
        logged: dict[str, Any] = {"runs": wandb.Table(columns=columns, data=data)}
        logged |= {sheet.title: wandb.Image(sheet.image) for sheet in page.sheets}
        run.log(logged)
    finally:
        run.finish()
