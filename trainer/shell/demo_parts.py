"""The demo base and its judge: loaded by name and only on request, because not every installation has them."""

from __future__ import annotations

import importlib
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ..base.base_model import BaseModel
from ..errors import SubjectBoothError
from ..files.storage import disk_errors, sha256_of
from ..measure.embedding import Embedder

DEMO = "demo"
"""The name of the demo base and of its judge, instead of a file or a folder."""

NARROW = "narrow"
"""The name of the narrow model, which computes what the demo base does, several times faster."""

COPY = f"{NARROW}-"
"""In front of the name of a copy of the narrow model that predicts v (demo/making/narrow_v.py)."""

_HERE = "trainer.shell.demo_parts"


@dataclass(frozen=True)
class MeasureSetup:
    """What depends on the embedder: on the demo base, pictures are small and prompts use its few words."""

    embedder: Embedder
    others: Sequence[str]
    resolution: int | None = None
    steps: int = 20
    guidance_scale: float = 7.0


def demo_setup() -> MeasureSetup:
    """The demo's judge, prompts and sampling.

    Raises:
        SubjectBoothError: this is not a clone of the repository.
    """
    judge, demo = _import("making.judge", "judge"), _import("making.judge_embedder", "judge")
    return MeasureSetup(demo.JudgeEmbedder(judge.LoadedJudge()), demo.OTHER_CAPTIONS, demo.SIDE, *demo.SAMPLING)


def demo_checkpoint(folder: Path) -> Path:
    """The demo base as a checkpoint in ``folder``; written the first time (460 MB).

    Raises:
        SubjectBoothError: the demo base is not installed or damaged, or the folder cannot be written.
    """
    base = _import("base", "checkpoint")
    with disk_errors("the demo base cannot be written", folder):
        try:
            path: Path = base.ensure_checkpoint(folder)
        except ValueError as error:
            raise SubjectBoothError("the demo base is damaged", "intact files", str(error), "demo/weights") from error
    return path


def narrow_base(name: str = NARROW) -> BaseModel:
    """The narrow model, or a copy of it that predicts v. The text encoder cannot be trained, and no other program reads
    the LoRAs.

    Args:
        name: :data:`NARROW`, or :data:`COPY` and the name of a copy.

    Raises:
        SubjectBoothError: this is not a clone of the repository.
    """
    denoiser = _import("making.narrow_denoiser", "narrow model")
    parts = ["the narrow model", _import("base", "narrow model").WEIGHTS]
    base: BaseModel
    if name == NARROW:
        base = denoiser.narrow_base(_import("making.narrow", "narrow model").load_narrow(), sha256_of(*parts))
    else:
        copies, copy = _import("making.narrow_v", "narrow model"), name.removeprefix(COPY)
        digest = sha256_of(*parts, copy)
        base = denoiser.narrow_base(copies.load_copy(copy), digest, copies.levels_of(copy), "v_prediction")
    return base


def _import(module: str, what: str) -> Any:
    parent = __name__.removesuffix(_HERE)  # "" for `python -m trainer`, otherwise that of the pack
    try:
        return importlib.import_module(f"{parent}demo.{module}")
    except ModuleNotFoundError as error:
        raise SubjectBoothError(
            f"the demo base's {what} is not part of this installation",
            "a clone of the repository",
            "clone it and run the command there, or use another base or embedder",
            "demo",
        ) from error
