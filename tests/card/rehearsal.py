"""The real trainer on a pretended card, at full size. See :mod:`tests.card.device`.

python tests/card/rehearsal.py NAME... prints a JSON line for each; the names are those of :data:`REHEARSALS`, and
``harness`` for :func:`harness`.
"""

from __future__ import annotations

import contextlib
import dataclasses
import gc
import json
import sys
import tempfile
import types
from collections.abc import Callable
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parent.parent.parent
package = types.ModuleType("subjectbooth")
package.__path__ = [str(ROOT)]
sys.modules.setdefault("subjectbooth", package)

import torch  # noqa: E402

from subjectbooth.tests.card.base import random_base  # noqa: E402
from subjectbooth.tests.card.counting import Counting  # noqa: E402
from subjectbooth.tests.card.device import CARD  # noqa: E402
from subjectbooth.tests.small_base import with_network, with_text_encoders  # noqa: E402
from subjectbooth.trainer.base.base_model import BaseModel  # noqa: E402
from subjectbooth.trainer.base.conditioning import EncodedText  # noqa: E402
from subjectbooth.trainer.config import TrainConfig  # noqa: E402
from subjectbooth.trainer.events import Adjusted, StepDone, Validation, ValidationStep  # noqa: E402
from subjectbooth.trainer.learn import checkpoint  # noqa: E402
from subjectbooth.trainer.learn.checkpoint import Checkpoint  # noqa: E402
from subjectbooth.trainer.learn.data import TrainingData  # noqa: E402
from subjectbooth.trainer.learn.loop import Training  # noqa: E402
from subjectbooth.trainer.preserve.class_images import ClassImages  # noqa: E402
from subjectbooth.trainer.preserve.none import NoPreservation  # noqa: E402
from subjectbooth.trainer.preserve.priors import ClassPriors  # noqa: E402

SIZES = {"sd1": 512, "sdxl": 1024}
CAPTIONS = ("a photo of ohwx dog", "ohwx dog on a beach", "ohwx dog, from above")
CLASS_PROMPT = "a photo of a dog"


def rehearse(
    name: str,
    *,
    capacity: int | None = None,
    resume: int = 0,
    priors: bool = False,
    plans: bool = True,
    **settings: Any,
) -> dict[str, Any]:
    """One run, and what was counted at each of its steps.

    Args:
        name: of the family.
        capacity: bytes that the card has.
        resume: after so many steps the run is stopped, its checkpoint written and read, and another one goes on.
        priors: class images too.
        plans: the plan is told that there is room for everything; else that nobody knows.
        settings: of :class:`TrainConfig`.
    """
    with Counting(capacity) as card:
        base = _base(name, card)
        config = TrainConfig(**{"resolution": SIZES[name], "checkpoint_seconds": 1e6, "steps": 2, **settings})
        data = _data(base, config, priors)
        found: dict[str, Any] = {"steps": [], "notes": [], "pictures": []}
        kept = None
        if resume:
            kept = _kept(_train(base, data, config, None, plans, card, found, resume))
            gc.collect()
        _train(base, data, config, kept, plans, card, found, config.steps)
        gc.collect()  # as the node does after a run
        found["left"] = card.live
    return found


def _base(name: str, card: Counting) -> BaseModel:
    with card.unreal_cpu():
        base = random_base(name, lambda: torch.empty)
    if hasattr(base.codec, "device"):
        base.codec.device = CARD
    build_unet, build_text = base.denoiser.build, base.text.models

    def unreal(build: Callable[[torch.dtype], Any]) -> Callable[[torch.dtype], Any]:
        def made(dtype: torch.dtype) -> Any:
            with card.unreal_cpu():
                return build(dtype)

        return made

    return with_text_encoders(with_network(base, unreal(build_unet)), unreal(build_text))


def _data(base: BaseModel, config: TrainConfig, priors: bool) -> TrainingData:
    side = config.resolution // 8
    family = base.text.family
    pooled = torch.zeros(1, family.text_encoders[-1].width) if family.text_encoders[-1].projects else None
    prompt = EncodedText(torch.zeros(1, 77, family.context_dim), pooled)
    prompts = (*CAPTIONS, CLASS_PROMPT, "")
    return TrainingData(
        torch.zeros(3, 4, side, side),
        CAPTIONS,
        dict.fromkeys(prompts, prompt),
        ClassImages(ClassPriors(torch.zeros(4, 4, side, side), CLASS_PROMPT, (), "")) if priors else NoPreservation(),
    )


def _train(
    base: BaseModel,
    data: TrainingData,
    config: TrainConfig,
    kept: Checkpoint | None,
    plans: bool,
    card: Counting,
    found: dict[str, Any],
    last: int,
) -> Checkpoint:
    """Train to step *last*; what is then kept."""
    shown = (CAPTIONS[0],) if config.validation_prompts else ()
    free = (lambda _: 10**12) if plans else (lambda _: None)
    with Training(base, data, config, shown, kept, CARD, free) as training:
        events = training.events()
        for event in events:
            if isinstance(event, ValidationStep):
                continue
            counts = card.next_step()
            if isinstance(event, StepDone):
                found["steps"].append(counts.to_json() | {"live": card.live, "loss": event.loss})
                if event.step == last and not config.validation_is_due(last):
                    break
            elif isinstance(event, Validation):
                found["pictures"].append(list(event.images.shape))
                found["validation"] = counts.to_json()
            elif isinstance(event, Adjusted):
                found["notes"].append(event.note)
        assert training._assembly is not None
        plan = training._assembly.plan
        found["plan"] = {
            "base": plan.base,
            "adapter": plan.adapter,
            "optimizer": plan.optimizer,
            "activations": plan.activations,
        }
        found["chosen"] = training.chosen.as_settings()
        found["layers"] = len(training.lora())
        snapshot = training.snapshot()
        events.close()
    return snapshot


def _kept(taken: Checkpoint) -> Checkpoint:
    """The checkpoint from the disk. What came from the card has no content: there it is zeros."""

    def real(value: Any) -> Any:
        return torch.zeros(value.shape, dtype=value.dtype) if isinstance(value, torch.Tensor) else value

    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "checkpoint.safetensors"
        checkpoint.save(
            path,
            dataclasses.replace(
                taken,
                adapter={name: real(tensor) for name, tensor in taken.adapter.items()},
                optimizer={
                    index: {name: real(value) for name, value in entries.items()}
                    for index, entries in taken.optimizer.items()
                },
                average=[real(tensor) for tensor in taken.average],
            ),
        )
        return checkpoint.load(path)


REHEARSALS: dict[str, dict[str, Any]] = {
    "sd1 bf16": {
        "name": "sd1",
        "precision": "bf16",
        "resume": 1,
        "ema_decay": 0.99,
        "validation_prompts": ("x",),
        "validation_interval": 0,
        "validation_steps": 1,
    },
    "sdxl fp16": {"name": "sdxl", "precision": "fp16", "steps": 1, "gradient_checkpointing": "on"},
    "sd1 fp16, too large": {
        "name": "sd1",
        "precision": "fp16",
        "steps": 1,
        "train_text_encoder": True,
        "plans": False,
        "capacity": 2_450_000_000,
    },
    # The slow ones.
    "sd1 fp16, far too large": {
        "name": "sd1",
        "precision": "fp16",
        "steps": 1,
        "train_text_encoder": True,
        "priors": True,
        "plans": False,
        "capacity": 2_450_000_000,
    },
    "sd1 fp16": {
        "name": "sd1",
        "precision": "fp16",
        "train_text_encoder": True,
        "priors": True,
        "snr_gamma": 5.0,
        "text_encoder_share": 0.5,
        "resume": 1,
        "gradient_accumulation_steps": 2,
        "pictures_per_forward": 1,
    },
    "sd1 fp32": {
        "name": "sd1",
        "precision": "fp32",
        "optimizer": "adafactor",
        "lora_targets": "all",
        "lora_dropout": 0.1,
        "resume": 1,
    },
    "sd1 prodigy": {
        "name": "sd1",
        "precision": "bf16",
        "optimizer": "prodigy",
        "learning_rate": 1.0,
        "resume": 1,
        "gradient_checkpointing": "on",
    },
    "sdxl bf16": {
        "name": "sdxl",
        "precision": "bf16",
        "train_text_encoder": True,
        "priors": True,
        "resume": 1,
        "validation_prompts": ("x",),
        "validation_interval": 0,
        "validation_steps": 1,
    },
}
"""What each rehearses. sd1 bf16: the running average, a checkpoint and its resume, a picture; too large: loss scaling,
a trained text encoder, and a card that is too small for everything at once; far too large: for two pictures too."""
HARNESS = "harness"
SLOW = ("sd1 fp16, far too large", "sd1 fp16", "sd1 fp32", "sd1 prodigy", "sdxl bf16")


def harness() -> dict[str, Any]:
    """What is known of a few operations, so that the card itself can be seen to tell right from wrong."""
    with Counting(capacity=3 * 2**20) as card:
        there, here = torch.zeros(256, 256).to(CARD), torch.zeros(256, 256)
        try:
            there + here
            mixed = ""
        except RuntimeError as error:
            mixed = str(error)
        card.next_step()
        half = there.half()
        (half @ half).view(-1)
        number = float(there.sum())
        counts = card.next_step()
        try:
            torch.zeros(2**20, device=CARD)
            room = ""
        except torch.OutOfMemoryError as error:
            room = str(error)
        return {"mixed": mixed, "number": number, "room": room, "real": float((here + 1).sum()), **counts.to_json()}


def main(names: list[str]) -> None:
    # One thread: what is freed when does not depend on chance.
    torch.autograd.set_multithreading_enabled(False)
    for name in names:
        with contextlib.redirect_stdout(sys.stderr):  # Prodigy prints
            found = harness() if name == HARNESS else rehearse(**REHEARSALS[name])
        print(json.dumps({"rehearsal": name, **found}), flush=True)


if __name__ == "__main__":
    main(sys.argv[1:])
