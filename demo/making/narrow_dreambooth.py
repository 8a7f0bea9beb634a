"""DreamBooth on the narrow model over several seeds, at a fraction of the wide model's cost.

A single run says little: another seed changes a gain by a few hundredths. The wide model repeats every channel, so its
LoRA is equivalent to a LoRA on the narrow model whose lora_down is the sum over the copies. Its initial values have the
same variance, and with adapted learning rates (:func:`rate_factor`) Adam takes the same steps. The differences: the
random initialisation, the wide model's additional time features, no gradient clipping, and that the rows of a lora_up
need not stay copies: after 290 steps through the nodes, what a layer adds to them differed by 6 % (median of the
layers of one run, in the norm; 66 % in the worst).
"""

from __future__ import annotations

import math
from concurrent.futures import ProcessPoolExecutor
from dataclasses import replace
from multiprocessing import get_context
from pathlib import Path
from statistics import mean
from typing import Any

import torch

from ..base import WEIGHTS
from ..expand import UNET_REPEAT, divisor
from .classes import caption
from .gain import SAMPLE_STEPS, photos, scale_of
from .judge import LoadedJudge
from .measure import Figures
from .measure_dreambooth import (
    CLASS_CFG,
    CLASS_IMAGES,
    OPTIONS,
    SETTINGS,
    STEPS,
    figures_of,
)
from .narrow import Narrow, load_narrow
from .narrow_measures import pictures_of_nets
from .schedule import sample
from .subjects import SUBJECTS

SEEDS = 4
CLASS_SEED = 7000


def rate_factor(name: str) -> float:
    """Learning rate factor for a weight of the narrow model's LoRA, so that it changes like the wide model's.

    Adam changes each copy of a lora_down column by the learning rate, so their sum changes by that times the number of
    copies. The wide query is smaller by the square root of that number, so the narrow lora_up must change more.

    Args:
        name: ``"<layer>.lora_A.weight"`` or ``"<layer>.lora_B.weight"``.
    """
    layer, kind = name.split(".lora_")
    root = math.sqrt(UNET_REPEAT) if layer.endswith("to_q") else 1.0
    copies = UNET_REPEAT if layer == "time_embed.0" else divisor(f"unet.{layer}.weight") / root
    return copies if kind.startswith("A") else root


def prompts_of(name: str) -> tuple[str, str]:
    """The class prompt and the training prompt of a subject."""
    word = SUBJECTS[name].class_word
    return caption(word, None), f"a photo of ohwx {word}"


def class_images_of(nets: Narrow, name: str, seed: int, count: int = CLASS_IMAGES) -> Any:
    """Class images for a run with this seed."""
    from trainer.preserve.priors import ClassPriors

    plain, _ = prompts_of(name)
    seeds = [CLASS_SEED + CLASS_IMAGES * seed + number for number in range(count)]
    drawn = sample(nets.unet, nets.text, [plain] * count, seeds, SAMPLE_STEPS, CLASS_CFG)
    return ClassPriors(drawn, plain, tuple(map(str, range(count))), f"{name} {seed} {count}")


def training_of(
    nets: Narrow,
    name: str,
    seed: int,
    way: Any,
    data: dict[str, Any] | None = None,
    t_lora: bool = False,
    **changes: Any,
) -> Any:
    """The training of a subject with the demo's settings.

    Args:
        way: how the class is kept.
        data: further fields of :class:`trainer.learn.data.TrainingData`.
        t_lora: see :mod:`demo.making.t_lora`.
        changes: settings of :class:`trainer.config.TrainConfig` that differ from the demo's.
    """
    from trainer.config import TrainConfig
    from trainer.learn.data import TrainingData
    from trainer.learn.loop import Training

    from .narrow_denoiser import narrow_base

    settings: dict[str, Any] = {
        "steps": STEPS, "seed": seed, "resolution": 64, "max_grad_norm": 0.0, "weight_decay": 0.0,
        "gradient_checkpointing": "off", **OPTIONS,
    }  # fmt: skip
    for setting in ("learning_rate", "rank", "network_alpha", "train_batch_size", "prior_loss_weight"):
        settings[setting] = SETTINGS[setting]
    base, more = narrow_base(nets, t_lora=t_lora), data or {}
    _, special = prompts_of(name)
    latents = base.codec.encode(photos(name, "train"))
    probed = more["probe"].all if "probe" in more else ()
    prompts = tuple(dict.fromkeys((special, *way.prompts, *probed, "")))
    encoded = dict(zip(prompts, base.prompts.encode(prompts), strict=True))
    everything = TrainingData(latents, (special,) * len(latents), encoded, way, **more)
    config = TrainConfig(**{**settings, **changes})
    return Training(base, everything, config, device=torch.device("cpu"), rate_factor=rate_factor)


def with_lora(nets: Narrow, name: str, seed: int, learning_rate: float) -> Narrow:
    """The nets after STEPS steps on the subject *name*, with the LoRA's running average in the UNet."""
    from trainer.preserve.class_images import ClassImages

    way = ClassImages(class_images_of(nets, name, seed))
    with training_of(nets, name, seed, way, learning_rate=learning_rate) as training:
        for _ in training.events():
            pass
        return replace(nets, unet=training.averaged_network())


def row_of(nets: Narrow, judge: LoadedJudge, name: str, seed: int, learning_rate: float) -> dict[str, Any]:
    """One run's figures, as in `measure_dreambooth`."""
    made = pictures_of_nets(nets, with_lora(nets, name, seed, learning_rate), SUBJECTS[name].class_word)
    scale = scale_of(judge, name, made["before"])
    return figures_of(scale, made["like"], made["scenes"], judge.classify(made["after"]), SUBJECTS[name].class_word)


def _rows(name: str, weights: Path, learning_rate: float) -> list[dict[str, Any]]:
    """A subject's rows, one for each seed, in a process of its own."""
    torch.set_num_threads(1)
    nets, judge = load_narrow(weights), LoadedJudge()
    return [row_of(nets, judge, name, seed, learning_rate) for seed in range(SEEDS)]


def measure_seeds(
    names: list[str],
    weights: Path = WEIGHTS,
    learning_rate: float = SETTINGS["learning_rate"],
) -> Figures:
    """The mean of SEEDS runs of each subject, with each seed's own figures."""
    figures: Figures = {"learning_rate": learning_rate, "seeds": SEEDS}
    with ProcessPoolExecutor(2, mp_context=get_context("spawn")) as pool:
        waiting = {name: pool.submit(_rows, name, weights, learning_rate) for name in names}
        for name, result in waiting.items():
            rows = result.result()
            figures[name] = {what: round(mean(row[what] for row in rows), 3) for what in rows[0]}
            figures[name]["each"] = [[round(value, 3) for value in row.values()] for row in rows]
    return figures
