"""``python -m trainer speed``: measures training steps with each setting that affects their speed, on this machine."""

from __future__ import annotations

import argparse
import dataclasses
import gc
import importlib
import json
import platform
import statistics
import tempfile
import time
from collections.abc import Iterator, Sequence
from contextlib import closing, contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch

from ..base.base_model import BaseModel
from ..base.stored.stored_base import load_base, stored_resolution
from ..config import AUTO, TrainConfig
from ..errors import SubjectBoothError
from ..events import Adjusted, Started, StepDone
from ..files.storage import disk_errors, make_folder, user_path, write_atomic
from ..learn.data import TrainingData
from ..learn.loop import Training
from ..learn.optimizers import usable_optimizer
from ..machine.attention import choose_attention
from ..machine.out_of_memory import free_memory, is_out_of_memory
from ..machine.runtime import choose_precision, default_device
from ..subject.subject import check_resolution
from .exit_code import exit_code_of
from .terms import error_in_shell

PROMPT = "a photo of ohwx dog"

WARM_UP, FEWEST, MOST = 2, 3, 200
"""Steps before the timed ones, and numbers of timed steps; within them, the time allowed decides."""

DEMO_RESOLUTION = 64
MINUTES = 2.0

_HERE = "trainer.shell.speed"


@dataclass
class Row:
    """One setting, and what it costs.

    Attributes:
        name: for the table.
        settings: of :class:`trainer.config.TrainConfig`, in which it differs from the others.
        seconds: of each timed step.
        memory: bytes; None if unknown.
        is_planned: whether ``memory`` is the memory plan, because the device does not count.
        reason: why it was not measured; empty if it was.
    """

    name: str
    settings: dict[str, Any]
    seconds: list[float] = field(default_factory=list)
    memory: int | None = None
    is_planned: bool = False
    reason: str = ""

    @property
    def median(self) -> float:
        """Seconds per step."""
        return statistics.median(self.seconds)

    @property
    def spread(self) -> tuple[float, float]:
        """The range of the middle half of the steps."""
        quarter = len(self.seconds) // 4
        ordered = sorted(self.seconds)
        return ordered[quarter], ordered[-1 - quarter]


def parser() -> argparse.ArgumentParser:
    """The options of the speed command."""
    options = argparse.ArgumentParser(
        prog="python -m trainer speed",
        description="Measures training steps, and nothing else, with each setting that affects their speed or memory: "
        "precisions, xformers, 8-bit AdamW, gradient checkpointing, compiling. Writes speed.md and speed.json. What "
        "cannot run on this machine is listed with the reason.",
        formatter_class=argparse.ArgumentDefaultsHelpFormatter,
    )
    options.add_argument(
        "--base",
        type=user_path,
        help="Checkpoint (.safetensors), or a folder in diffusers' format. Default: the demo base.",
    )
    options.add_argument(
        "--resolution",
        type=int,
        help=f"Side of the images in pixels. Default: the base's native size; {DEMO_RESOLUTION} for the demo base.",
    )
    options.add_argument("--rank", type=int, default=16, help="Rank of the LoRA.")
    options.add_argument("--train_batch_size", type=int, default=1, help="Images in a step.")
    options.add_argument("--minutes", type=float, default=MINUTES, help="Time for all settings together, about.")
    options.add_argument(
        "--output_dir", type=user_path, default=Path("subjectbooth_speed"), help="Folder for speed.md and speed.json."
    )
    options.add_argument("--cpu", action="store_true", help="Use the CPU even if there is a GPU.")
    return options


def main(arguments: Sequence[str]) -> int:
    """Measure; returns the exit code. Errors go to stderr without a traceback."""
    options = parser().parse_args(arguments)
    return exit_code_of(lambda: print(_measure(options)), "stopped; nothing was written")


def _measure(options: argparse.Namespace) -> str:
    from tqdm import tqdm

    if not 0.01 <= options.minutes <= 600:
        raise SubjectBoothError(f"minutes {options.minutes:g}", "a number from 0.01 to 600", "use 2", "minutes")
    if options.resolution is not None:
        check_resolution(options.resolution)
    common = TrainConfig(
        rank=options.rank,
        network_alpha=float(options.rank),
        train_batch_size=options.train_batch_size,
        pictures_per_forward=options.train_batch_size,
        gradient_checkpointing="off",
        steps=WARM_UP + MOST,
    )
    device = torch.device("cpu") if options.cpu else default_device()
    with disk_errors("the table cannot be written", options.output_dir):
        make_folder(options.output_dir)
    with _base_file(options.base) as path:
        resolution = options.resolution or (stored_resolution(path) if options.base else DEMO_RESOLUTION)
        common = dataclasses.replace(common, resolution=resolution)
        base = load_base(path, device=device)
        data = _random_data(base, common)
        rows = rows_for(common, device)
        started = time.monotonic()
        todo = [row for row in rows if not row.reason]
        with tqdm(todo, unit="setting", dynamic_ncols=True) as bar:  # shows the time left
            for done, row in enumerate(bar):
                bar.set_postfix_str(row.name)
                left = 60 * options.minutes - (time.monotonic() - started)
                measure_row(row, base, data, common, device, left / (len(todo) - done))
    about = {
        "base": options.base.name if options.base else "demo base",
        "family": base.family,
        "resolution": resolution,
        "rank": options.rank,
        "batch": options.train_batch_size,
        "device": torch.cuda.get_device_name(device) if device.type == "cuda" else f"{device} ({platform.machine()})",
        "torch": torch.__version__,
        "threads": torch.get_num_threads(),
        "date": time.strftime("%Y-%m-%d %H:%M"),
    }
    table = markdown(rows, about)
    with disk_errors("the table cannot be written", options.output_dir):
        write_atomic(options.output_dir / "speed.md", table)
        write_atomic(options.output_dir / "speed.json", json.dumps(_as_json(rows, about), indent=1, ensure_ascii=False))
    return f"{table}\nsaved: {options.output_dir / 'speed.md'}, {options.output_dir / 'speed.json'}"


def rows_for(common: TrainConfig, device: torch.device) -> list[Row]:
    """The settings to measure: each precision, and the others in the precision that ``auto`` chooses."""
    precision, _ = choose_precision(common, device)
    rows = [Row(name, {"precision": name}) for name in ("fp32", "fp16", "bf16")]
    rows += [
        Row(f"{precision}, xformers", {"precision": precision, "attention": "xformers"}),
        Row(f"{precision}, 8-bit AdamW", {"precision": precision, "optimizer": "adamw8bit"}),
        Row(f"{precision}, gradient checkpointing", {"precision": precision, "gradient_checkpointing": "on"}),
    ]
    if any(setting.name == "compile" for setting in dataclasses.fields(TrainConfig)):
        rows.append(Row(f"{precision}, compile", {"precision": precision, "compile": "on"}))
    for row in rows:
        row.reason = _missing(row, device)
    return rows


def _missing(row: Row, device: torch.device) -> str:
    """Why a setting cannot run here, as far as that is known without trying; otherwise empty."""
    if device.type == "cpu" and row.settings["precision"] != "fp32":
        return "a CPU is hundreds of times slower in half precision"
    _, attention = choose_attention(row.settings.get("attention", AUTO), device)
    _, optimizer = usable_optimizer(row.settings.get("optimizer", "adamw"), device)
    return attention or optimizer


def measure_row(
    row: Row, base: BaseModel, data: TrainingData, common: TrainConfig, device: torch.device, seconds: float
) -> None:
    """Train a few steps and fill in the row.

    Args:
        seconds: time allowed, loading the base included; at least :data:`FEWEST` steps are timed.
    """
    until = time.monotonic() + seconds
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats(device)
    try:
        config = dataclasses.replace(common, **row.settings)
        with Training(base, data, config, device=device, free=lambda _: None) as training:
            events: Any = training.events()  # a generator
            with closing(events):
                _time_steps(row, events, until)
            if device.type == "cuda":
                row.memory = torch.cuda.max_memory_allocated(device)
            else:
                row.memory, row.is_planned = training.memory_plan.needed, True
    except SubjectBoothError as error:
        row.reason = error_in_shell(error)
    except Exception as error:
        if not is_out_of_memory(error):
            raise
        row.reason = "out of memory"
    if row.reason:
        row.seconds, row.memory = [], None
    gc.collect()
    free_memory(device)


def _time_steps(row: Row, events: Iterator[Any], until: float) -> None:
    steps, before = 0, time.perf_counter()
    for event in events:
        now = time.perf_counter()
        if isinstance(event, Adjusted):
            row.reason = event.note
            return
        if isinstance(event, Started):
            changed = [name for name, value in row.settings.items() if event.chosen.get(name, value) != value]
            if changed:
                row.reason = "; ".join(event.notes) or f"{changed[0]} {row.settings[changed[0]]} is not used here"
                return
        if isinstance(event, StepDone):
            steps += 1
            if steps > WARM_UP:
                row.seconds.append(now - before)
            if len(row.seconds) >= FEWEST and time.monotonic() > until:
                return
        before = time.perf_counter()


def markdown(rows: Sequence[Row], about: dict[str, Any]) -> str:
    """The table."""
    first = next((row for row in rows if row.seconds), None)
    planned = any(row.is_planned for row in rows)
    lines = [
        f"Training steps of {about['family']} ({about['base']}) at {about['resolution']} px, rank {about['rank']}, "
        f"batch {about['batch']}, with SDPA, AdamW and no gradient checkpointing unless stated.",
        f"{about['device']}, torch {about['torch']}, {about['date']}.",
        "",
        f"| setting | s per step | middle half | speed | {'planned' if planned else 'peak'} memory (GB) | steps |",
        "|---|---|---|---|---|---|",
    ]
    for row in rows:
        if not row.seconds or first is None:
            lines.append(f"| {row.name} | not measured: {row.reason} | | | | |")
            continue
        low, high = row.spread
        memory = "?" if row.memory is None else f"{row.memory / 1e9:.2f}"
        lines.append(
            f"| {row.name} | {row.median:.4g} | {low:.4g} to {high:.4g} | {first.median / row.median:.2f} | {memory} | "
            f"{len(row.seconds)} |"
        )
    return "\n".join(lines) + "\n"


def _as_json(rows: Sequence[Row], about: dict[str, Any]) -> dict[str, Any]:
    return {
        **about,
        "rows": [
            {**dataclasses.asdict(row), "median": row.median if row.seconds else None} for row in rows
        ],
    }  # fmt: skip


def _random_data(base: BaseModel, config: TrainConfig) -> TrainingData:
    """Random latents: their content does not affect the time."""
    size = base.denoiser.latent_size(config.resolution, config.resolution)
    prompts = (PROMPT, "")
    encoded = dict(zip(prompts, base.prompts.encode(prompts), strict=True))
    latents = torch.randn(3, *size, generator=torch.Generator().manual_seed(0))
    return TrainingData(latents, (PROMPT,) * 3, encoded)


@contextmanager
def _base_file(base: Path | None) -> Iterator[Path]:
    """The base to measure; the demo base is expanded to a temporary file."""
    if base is not None:
        yield base
        return
    try:
        demo = importlib.import_module(f"{__name__.removesuffix(_HERE)}demo.base")
    except ModuleNotFoundError as error:
        raise SubjectBoothError(
            "the demo base is not part of this installation", "a base model", "add --base", "--base"
        ) from error
    with tempfile.TemporaryDirectory(prefix="subjectbooth_speed_") as folder:
        with disk_errors("the demo base cannot be written", Path(folder)):
            path = demo.ensure_checkpoint(Path(folder))
        yield path
