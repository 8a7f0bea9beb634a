"""How long a run will take and whether it will fit, before it starts: from the last run of the same base.

Nothing is loaded, and what was read of a run is kept while its files stay the same: the editor asks after every change.
Times are those of this machine, scaled to the new settings; memory is what that run counted, see
:func:`trainer.memory.plan.replan`.
"""

from __future__ import annotations

import json
import os
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ..config import TrainConfig
from ..errors import SubjectBoothError
from ..events import Started, StepDone
from ..files.kept_reads import KeptReads
from ..files.storage import read_json_object
from ..machine.resolved_settings import ResolvedSettings
from ..memory.plan import Plan, replan
from ..preserve.class_images import ClassImages
from ..preserve.curvature import Curvature

LOG, RECORD = "events.jsonl", "run.json"
END = 32 * 1024
"""Bytes read from either end of a log: the start with its plan, and a hundred of the last steps."""
RECENT = 20
"""Steps whose time is averaged, as for the remaining time of a run."""
MOST_TRIED = 20
"""Runs whose logs are opened, at most; the latest of the base are the first."""
SPEED = (
    "train_batch_size",
    "gradient_accumulation_steps",
    "resolution",
    "rank",
    "precision",
    "lora_targets",
    "optimizer",
    "gradient_checkpointing",
    "train_text_encoder",
    "enable_bucket",
    "attention",
)
"""Settings that affect the time of a step: a run in which they are the same needs no scaling."""
FORWARD = 1 / 3
"""Share of a forward pass in a training step; the backward pass takes twice as long."""
STUDIED = 96
"""Images that ``curvature`` learns from before the first step: 64, and 32 to calibrate."""
SCORED, SCORED_FIRST = 14, 8
"""Forward passes of one image for the scores of a step, and for the base's."""


@dataclass(frozen=True)
class Estimate:
    """What a run is expected to take.

    Attributes:
        seconds: in total, with validation images, scores and the study of the base.
        step: seconds per step.
        plan: the memory plan; None if the earlier run did not count.
        folder: of the earlier run.
        trigger: its trained words.
        is_scaled: whether that run had other settings that affect its speed.
    """

    seconds: float
    step: float
    plan: Plan | None
    folder: Path
    trigger: str
    is_scaled: bool


def latest_runs(root: Path) -> list[Path]:
    """The folders of all runs that have a log, the latest change of it first.

    Args:
        root: the folder that contains all runs.
    """
    found = []
    try:
        folders = [Path(entry.path) for entry in os.scandir(root) if entry.is_dir(follow_symlinks=False)]
    except OSError:  # nothing was trained yet
        return []
    for folder in folders:
        try:
            found.append((-(folder / LOG).stat().st_mtime, folder))
        except OSError:
            continue
    return [folder for _, folder in sorted(found)]


def estimate(runs: Iterable[Path], config: TrainConfig, preservation: str, free: int | None) -> Estimate | None:
    """Estimate a run.

    Args:
        runs: the folders of those of the same base on this machine, the latest first.
        config: the requested settings.
        preservation: the requested way to keep the class.
        free: bytes that training could use; None if unknown.

    Returns:
        None if no run of this base has got far enough.
    """
    best: Estimate | None = None
    for folder in list(runs)[:MOST_TRIED]:
        found = _from_run(folder, config, preservation, free)
        if found is not None and not found.is_scaled:
            return found
        best = best or found
    return best


def _from_run(folder: Path, config: TrainConfig, preservation: str, free: int | None) -> Estimate | None:
    record, before = _records(folder / RECORD)
    started, seconds = _logs(folder / LOG)
    if before is None or not seconds:
        return None
    counts = {name: value for name, value in (started.get("memory") or {}).items() if isinstance(value, int)}
    added = _added(preservation) / _added(record.get("preservation"))
    batch = config.train_batch_size / before.train_batch_size * added
    area = (config.resolution / before.resolution) ** 2
    step = sum(seconds) / len(seconds) * batch * area * config.gradient_accumulation_steps
    step /= before.gradient_accumulation_steps
    pictures = max(
        1, round(counts.get("pictures", before.train_batch_size * _added(record.get("preservation"))) * batch)
    )
    drawn = config.validations_left(0) * len(config.validation_prompts) * config.validation_steps
    scored = 0
    if config.validation_interval:  # with prompts or without
        scored = SCORED_FIRST + SCORED * -(-config.steps // config.validation_interval)
    studied = STUDIED if preservation == Curvature.name else 0
    # With guidance, each sampling step is two forward passes: for the prompt and for the negative prompt.
    beside = (FORWARD * (2 * drawn + scored) + studied) * step / (pictures * config.gradient_accumulation_steps)
    plan = None
    if counts:
        chosen = ResolvedSettings.from_settings(started.get("chosen") or {})
        plan = replan(counts, before, config, pictures, chosen, free)
    same = record.get("preservation") == preservation and all(
        getattr(config, name) == getattr(before, name) for name in SPEED
    )
    return Estimate(config.steps * step + beside, step, plan, folder, str(record.get("trigger", "")), not same)


def _added(preservation: object) -> int:
    """Images per photo of a batch: only one way adds whole images to every step."""
    return 2 if preservation == ClassImages.name else 1


def _read_record(path: Path) -> tuple[dict[str, Any], TrainConfig | None]:
    """The record of a run, and its settings; None if they are of another version."""
    record = read_json_object(path)
    try:
        return record, TrainConfig.from_json(record["config"])
    except (ValueError, KeyError, TypeError, AttributeError, SubjectBoothError):
        return {}, None


def _read_log(log: Path) -> tuple[dict[str, Any], list[float]]:
    """The last start in the log with a plan, and the seconds of the last steps, from both ends of the file."""
    try:
        with log.open("rb") as file:
            head = file.read(END)
            size = os.fstat(file.fileno()).st_size
            file.seek(max(len(head), size - END))
            tail = file.read(END)
    except OSError:
        return {}, []
    started: dict[str, Any] = {}
    seconds: list[float] = []
    for line in [*head.split(b"\n"), *tail.split(b"\n")]:
        try:
            values = json.loads(line)
            event = values["event"]
        except (ValueError, KeyError, TypeError, RecursionError):  # a line that was cut
            continue
        if event == Started.__name__ and isinstance(values.get("memory"), dict):
            started = values
        elif event == StepDone.__name__ and isinstance(values.get("seconds"), (int, float)) and values["step"] > 1:
            seconds.append(float(values["seconds"]))  # the first step includes the warm-up
    return started, seconds[-RECENT:]


_records = KeptReads(_read_record)
_logs = KeptReads(_read_log)
