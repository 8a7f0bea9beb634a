"""Runs that are killed with SIGKILL at random moments, many in a minute: one process loads everything and forks them.

python kill_driver.py FOLDER KILLS SEED, where KILLS is for each kind of run; prints a JSON line a kind. The model
is that of tests/small_base.py; the same is done to the whole program, a process each, by tests/soak. Torch cannot
go backward in a fork of a process that has done so, so the runs that are never killed are forked too.
"""

from __future__ import annotations

import dataclasses
import json
import os
import random
import signal
import sys
import time
import types
from itertools import pairwise
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[3]
package = types.ModuleType("subjectbooth")
package.__path__ = [str(ROOT)]
sys.modules.setdefault("subjectbooth", package)

import safetensors.torch  # noqa: E402
import torch  # noqa: E402

from subjectbooth.tests.small_base import small_base, small_subject  # noqa: E402
from subjectbooth.trainer.config import TrainConfig  # noqa: E402
from subjectbooth.trainer.events import StepDone  # noqa: E402
from subjectbooth.trainer.learn import checkpoint  # noqa: E402
from subjectbooth.trainer.preserve.class_images import ClassImages  # noqa: E402
from subjectbooth.trainer.preserve.generate import generate  # noqa: E402
from subjectbooth.trainer.preserve.none import NoPreservation  # noqa: E402
from subjectbooth.trainer.preserve.priors import ClassPriors  # noqa: E402
from subjectbooth.trainer.runs.run import Run  # noqa: E402
from subjectbooth.trainer.subject.subject import Subject  # noqa: E402

STEPS = 20
SAMPLING_STEPS = 6
CPU = torch.device("cpu")
KINDS: dict[str, tuple[int, dict[str, Any]]] = {
    "plain": (0, {}),
    "class images": (6, {}),
    "accumulation, cosine schedule": (0, {"gradient_accumulation_steps": 2, "lr_scheduler": "cosine"}),
    "EMA, dropout, flip": (0, {"ema_decay": 0.9, "lora_dropout": 0.1, "flip": True}),
    "aspect-ratio buckets": (0, {"enable_bucket": True}),
    "text encoder": (0, {"train_text_encoder": True}),
    "class images, text encoder, EMA, accumulation, buckets": (
        4,
        {
            "train_text_encoder": True,
            "text_encoder_share": 0.5,
            "ema_decay": 0.9,
            "gradient_accumulation_steps": 2,
            "enable_bucket": True,
        },
    ),
}


def subject(buckets: bool) -> Subject:
    """Three photos; for buckets of two shapes."""
    made = small_subject()
    if not buckets:
        return made
    first, *rest = made.photos
    return dataclasses.replace(made, photos=(dataclasses.replace(first, pixels=first.pixels[:52].copy()), *rest))


def train(folder: Path, kind: str) -> None:
    """One program's whole work: class images, if any, then the run."""
    count, options = KINDS[kind]
    config = TrainConfig(
        steps=STEPS,
        learning_rate=1e-3,
        rank=4,
        network_alpha=4.0,
        resolution=64,
        train_batch_size=2,
        checkpoint_seconds=0.0,
        **options,
    )
    base, priors = small_base(), None
    if count:
        enter(folder, "class images")
        for made in generate(base, "a photo of a dog", count, 64, folder / "class_images", CPU, steps=SAMPLING_STEPS):
            priors = made if isinstance(made, ClassPriors) else None
        enter(folder, "starting")
    way = NoPreservation() if priors is None else ClassImages(priors)
    for event in Run(base, subject(config.enable_bucket), way, config, folder / "runs", CPU).events():
        if isinstance(event, StepDone) and entered(folder) != "training":
            enter(folder, "training")


def enter(folder: Path, phase: str) -> None:
    """Note what the run is at, so that a kill is counted where it fell."""
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "phase").write_text(phase, "utf-8")


def entered(folder: Path) -> str:
    """What the run was at last; a program that was killed between opening the note and writing it is starting."""
    note = folder / "phase"
    return (note.read_text("utf-8") if note.is_file() else "") or "starting"


def run_once(folder: Path, kind: str, seconds: float | None, pictures: int | None = None) -> bool:
    """Whether it was killed, after so many seconds; None lets it end.

    Args:
        pictures: count the seconds from when the run is at its class images and has so many; from its begin without.
    """
    enter(folder, "starting")
    child = os.fork()
    if child == 0:
        try:
            train(folder, kind)
        except BaseException as error:
            print(f"{kind}: {type(error).__name__}: {error}", file=sys.stderr, flush=True)
            os._exit(1)
        os._exit(0)
    ended, status = 0, 0
    if seconds is not None:
        while pictures is not None and not drawing(folder, pictures) and not ended:
            ended, status = os.waitpid(child, os.WNOHANG)
            time.sleep(0.001)
        if not ended:
            time.sleep(seconds)
            os.kill(child, signal.SIGKILL)
    if not ended:
        _, status = os.waitpid(child, 0)
    if os.WIFSIGNALED(status):
        return True
    if os.WEXITSTATUS(status):
        raise SystemExit(f"{kind}: ended with an error")
    return False


def drawing(folder: Path, pictures: int) -> bool:
    """Whether the run makes class images and has so many or more."""
    return entered(folder) == "class images" and len(image_files(folder)) >= pictures


def log_of(folder: Path) -> list[dict[str, Any]]:
    """The steps in the run's log; a torn line counts for nothing."""
    entries = []
    for log in folder.glob("runs/*/events.jsonl"):
        for line in log.read_text("utf-8", errors="replace").splitlines():
            try:
                entry = json.loads(line)
            except ValueError:
                continue
            if entry.get("event") == "StepDone":
                entries.append(entry)
    return entries


def image_files(folder: Path) -> list[Path]:
    """The class images that are whole."""
    return [path for path in folder.glob("class_images/*/*.safetensors") if not path.name.startswith(".")]


def seconds_a_picture(folder: Path) -> float:
    """The least between two class images of a run that was never killed; 0 without any."""
    times = sorted(path.stat().st_mtime for path in image_files(folder))
    return min((after - before for before, after in pairwise(times)), default=0.0)


def outcome(folder: Path) -> tuple[object, ...]:
    (lora,) = folder.glob(f"runs/*/lora_{STEPS:06d}.safetensors")
    weights = {name: tensor.numpy().tobytes() for name, tensor in safetensors.torch.load_file(lora).items()}
    images = {path.name: path.read_bytes() for path in image_files(folder)}
    return weights, images, [(entry["step"], entry["loss"]) for entry in log_of(folder)]


def last_step(folder: Path) -> int:
    """The last step in the log."""
    return max((entry["step"] for entry in log_of(folder)), default=0)


def soak(folder: Path, kind: str, kills: int, choose: random.Random) -> dict[str, Any]:
    """The same run, never killed and killed again and again; as many of the latter as the kills take.

    Every other kill of a run that makes class images waits for some of those that are missing, and so falls among them.
    """
    began = time.monotonic()
    run_once(folder / "whole", kind, None)
    usual, expected = time.monotonic() - began, outcome(folder / "whole")
    picture = seconds_a_picture(folder / "whole")
    row: dict[str, Any] = {
        "name": kind,
        "kills": 0,
        "starting": 0,
        "class images": 0,
        "training": 0,
        "trainings": 0,
        "lost steps": 0,
        "identical": True,
    }
    while row["kills"] < kills and row["identical"] and row["trainings"] < 20 * kills:
        row["trainings"] += 1
        cut = folder / f"cut {row['trainings']}"
        while row["kills"] < kills:
            have, all_of_them = len(image_files(cut)), KINDS[kind][0]
            among = have < all_of_them and row["kills"] % 2 == 0
            pictures = choose.randrange(have, max(have + 1, all_of_them - 1)) if among else None
            if not run_once(cut, kind, choose.uniform(0.0, picture if among else usual), pictures):
                break
            row[entered(cut)] += 1
            row["kills"] += 1
            saved = [checkpoint.load(path).step for path in cut.glob("runs/*/checkpoint.safetensors")]  # never half
            row["lost steps"] = max(row["lost steps"], last_step(cut) - max(saved, default=0))
        run_once(cut, kind, None)
        row["identical"] = outcome(cut) == expected
    return row


def load_libraries() -> None:
    """Everything that a run imports, so that a fork has it at once."""
    import accelerate  # noqa: F401
    import diffusers.models.unets.unet_2d_condition  # noqa: F401
    import peft

    from subjectbooth.tests.small_base import small_text_encoder, small_unet

    peft.inject_adapter_in_model(peft.LoraConfig(target_modules=["to_q"]), small_unet())
    small_text_encoder()


if __name__ == "__main__":
    load_libraries()
    choose = random.Random(int(sys.argv[3]))
    for number, kind in enumerate(KINDS):
        print(json.dumps(soak(Path(sys.argv[1]) / str(number), kind, int(sys.argv[2]), choose)), flush=True)
