"""Trainings from a shell that are killed at random moments and started again, against one that never was."""

from __future__ import annotations

import dataclasses
import json
import os
import random
import subprocess
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

from setup_env import ROOT, Environment

CHECKPOINT_SECONDS = 2.0
"""Of work between two checkpoints while soaking: short, so that many kills fall into the writing of one."""


@dataclasses.dataclass(frozen=True)
class Plan:
    """One kind of training: its name, and the trainer's options that make it so."""

    name: str
    arguments: tuple[str, ...]


PLANS = (
    Plan("plain", ()),
    Plan("class images", ("--num_class_images", "6")),
    Plan("accumulation and a cosine schedule", ("--gradient_accumulation_steps", "2", "--lr_scheduler", "cosine")),
    Plan("EMA, dropout and flip", ("--ema_decay", "0.9", "--lora_dropout", "0.1", "--flip")),
    Plan("aspect-ratio buckets", ("--enable_bucket", "--train_batch_size", "2")),
    Plan("text encoder", ("--train_text_encoder",)),
    Plan(
        "all of it",
        (
            "--num_class_images",
            "4",
            "--train_text_encoder",
            "--text_encoder_share",
            "0.5",
            "--ema_decay",
            "0.9",
            "--gradient_accumulation_steps",
            "2",
            "--enable_bucket",
            "--train_batch_size",
            "2",
            "--lr_scheduler",
            "linear",
            "--lora_dropout",
            "0.1",
        ),
    ),
)


def kill_plan(
    environment: Environment,
    base: Path,
    photos: Path,
    plan: Plan,
    kills: int,
    choose: random.Random,
    scratch: Path,
    *,
    steps: int = 24,
) -> dict[str, Any]:
    """Train once without a kill and once with ``kills`` of them.

    Returns:
        name, kills (in ``starting``, ``class images`` and ``training``), the most steps and seconds of work that one
        kill cost, and whether the LoRA, the class images and the losses came out ``identical``.
    """
    command = [
        str(environment.python),
        "-m",
        "trainer",
        "--base",
        str(base),
        "--photos",
        str(photos),
        "--class-word",
        "cat",
        "--output_name",
        "cat",
        "--resolution",
        "64",
        "--steps",
        str(steps),
        "--rank",
        "4",
        "--network_alpha",
        "4",
        "--learning_rate",
        "0.001",
        "--cpu",
        "--checkpoint_seconds",
        str(CHECKPOINT_SECONDS),
        *plan.arguments,
    ]
    whole, cut = (
        Place(folder / "runs", folder / "class_images", folder / "cat.safetensors")
        for folder in (scratch / "whole", scratch / "cut")
    )
    started = time.monotonic()
    _run([*command, "--output_dir", str(scratch / "whole")], None)
    usual = time.monotonic() - started
    tally = Tally(plan.name)
    while tally.found["kills"] < kills:
        before = cut.progress()
        if _run([*command, "--output_dir", str(scratch / "cut")], _random_moment(cut, before, usual, choose)):
            tally.kill(cut, before)
        else:  # it ended before its kill: start over, so that there is something to kill
            cut.forget()
    _run([*command, "--output_dir", str(scratch / "cut")], None)
    return tally.end(whole.outcome() == cut.outcome())


@dataclasses.dataclass(frozen=True)
class Place:
    """Where a training leaves its things: the folder of its runs, that of its class images, and the LoRA."""

    runs: Path
    images: Path
    lora: Path

    def progress(self) -> tuple[int, int]:
        """How many files of class images there are, and the last step in a run's log."""
        return len(self._images()), max((step["step"] for step in self.steps()), default=0)

    def steps(self) -> list[dict[str, Any]]:
        """The log's steps; a torn line counts for nothing."""
        found = []
        for log in self.runs.glob("*/events.jsonl"):
            for line in log.read_text("utf-8", errors="replace").splitlines():
                try:
                    entry = json.loads(line)
                except ValueError:
                    continue
                if entry.get("event") == "StepDone":
                    found.append(entry)
        return found

    def lost(self) -> tuple[int, float]:
        """Steps, and seconds of work in them, that are in the log and not in the checkpoint."""
        saved = 0
        for path in self.runs.glob("*/checkpoint.safetensors"):
            saved = json.loads(header_of(path)["__metadata__"]["state"])["step"]
        behind = [entry["seconds"] for entry in self.steps() if entry["step"] > saved]
        return len(behind), sum(behind)

    def outcome(self) -> dict[str, object]:
        """What must come out the same: the LoRA's weights, all class images, and the loss of every step."""
        tensors = {name: entry for name, entry in header_of(self.lora).items() if name != "__metadata__"}
        images = {path.name: path.read_bytes() for path in self._images()}
        losses = [(entry["step"], entry["loss"]) for entry in self.steps()]
        return {"names": tensors, "weights": body_of(self.lora), "class images": images, "losses": losses}

    def forget(self) -> None:
        """Start over: without log, checkpoint and LoRA."""
        for path in [*self.runs.glob("*/events.jsonl"), *self.runs.glob("*/*.safetensors"), self.lora]:
            if path.parent.parent != self.images:
                path.unlink(missing_ok=True)

    def _images(self) -> list[Path]:
        return sorted(path for path in self.images.glob("*/*.safetensors") if not path.name.startswith("."))


class Tally:
    """What the kills of one kind of training cost."""

    def __init__(self, name: str) -> None:
        self.found: dict[str, Any] = {
            "name": name,
            "kills": 0,
            "starting": 0,
            "class images": 0,
            "training": 0,
            "lost steps": 0,
            "lost seconds": 0.0,
            "longest step": 0.0,
        }

    def kill(self, place: Place, before: tuple[int, int]) -> None:
        """Count a kill that has just happened."""
        after, found = place.progress(), self.found
        phase = "training" if after[1] > before[1] else "class images" if after[0] > before[0] else "starting"
        steps, seconds = place.lost()
        found[phase] += 1
        found["kills"] += 1
        found["lost steps"] = max(found["lost steps"], steps)
        found["lost seconds"] = max(found["lost seconds"], round(seconds, 2))
        longest = max((entry["seconds"] for entry in place.steps()), default=0.0)
        found["longest step"] = max(found["longest step"], round(longest, 2))
        print(f"{found['name']}: kill {found['kills']} in {phase}, at step {after[1]}, {steps} steps lost", flush=True)

    def end(self, identical: bool) -> dict[str, Any]:
        """The figures, with how it came out."""
        self.found["identical"] = identical
        print(f"{self.found['name']}: {'identical' if identical else 'DIFFERENT'}", flush=True)
        return self.found


def header_of(path: Path) -> dict[str, Any]:
    """A safetensors file's header."""
    with path.open("rb") as file:
        return dict(json.loads(file.read(int.from_bytes(file.read(8), "little"))))


def body_of(path: Path) -> bytes:
    """A safetensors file's tensors, as bytes."""
    content = path.read_bytes()
    return content[8 + int.from_bytes(content[:8], "little") :]


def _random_moment(
    place: Place, before: tuple[int, int], usual: float, choose: random.Random
) -> Callable[[float], bool]:
    """Says when to kill: mostly a moment after the first progress, sometimes any moment from the start on."""
    if choose.random() < 0.2:
        any_time = choose.uniform(0.1, usual)
        return lambda seconds: seconds >= any_time
    delay, seen = choose.uniform(0.0, 4.0), [0.0]

    def due(seconds: float) -> bool:
        if not seen[0] and place.progress() > before:
            seen[0] = seconds
        return bool(seen[0]) and seconds >= seen[0] + delay

    return due


def _run(command: list[str], due: Callable[[float], bool] | None) -> bool:
    """Whether it was killed. Without ``due`` it runs to its end."""
    env = {**os.environ, "HF_HUB_OFFLINE": "1", "PYTHONIOENCODING": "utf-8", "OMP_NUM_THREADS": "1"}
    with subprocess.Popen(command, cwd=ROOT, env=env, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE) as process:
        started = time.monotonic()
        if due is not None:
            while process.poll() is None and not due(time.monotonic() - started):
                time.sleep(0.02)
            if process.poll() is None:
                process.kill()
                process.communicate()
                return True
        said = process.communicate()[1].decode("utf-8", "replace")
        if process.returncode:
            raise SystemExit(f"the training ended with code {process.returncode}:\n{said}")
        return False
