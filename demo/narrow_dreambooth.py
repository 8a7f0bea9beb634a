"""DreamBooth on the narrow model: over several seeds, at a small part of the wide model's cost.

One run says little: another seed moves a gain by some hundredths. Every channel of the wide model lies there several
times, so its LoRA is a LoRA on the narrow one whose lora_down is the sum of the copies' own. It starts with the same
spread, and takes the steps that the wide one takes under Adam if its learning rates follow (:func:`parameter_groups`).
What differs: the random start, the wide time features between the narrow ones, and that no gradient is clipped.
"""

from __future__ import annotations

import copy
import math
from concurrent.futures import ProcessPoolExecutor
from dataclasses import replace
from multiprocessing import get_context
from pathlib import Path
from statistics import mean
from typing import Any

import torch
from torch import nn

from .base import WEIGHTS
from .classes import caption, place
from .expand import UNET_REPEAT, divisor
from .gain import CFG, PICTURES, SAMPLE_STEPS, photos, scale_of
from .judge import LoadedJudge
from .measure import Figures, draw
from .measure_dreambooth import (
    CLASS_CFG,
    CLASS_IMAGES,
    OPTIONS,
    SCENES_OF_PICTURES,
    SETTINGS,
    STEPS,
    figures_of,
)
from .narrow import Narrow, load_narrow
from .schedule import alphas_cumprod, sample
from .subjects import SUBJECTS
from .words import token_ids

SEEDS = 4
CLASS_SEED = 7000


def parameter_groups(unet: nn.Module, learning_rate: float) -> list[dict[str, Any]]:
    """The LoRA's weights, each with the rate at which the narrow model's LoRA moves as the wide one's does.

    Adam moves every copy of a column of lora_down by the rate, and their sum by as many rates as there are copies. The
    wide query is smaller by the root of the copies, so its lora_up counts that much more in the narrow one.
    """
    groups = []
    for name, parameter in unet.named_parameters():
        if not parameter.requires_grad:
            continue
        layer, kind = name.split(".lora_")
        root = math.sqrt(UNET_REPEAT) if layer.endswith("to_q") else 1.0
        copies = UNET_REPEAT if layer == "time_embed.0" else divisor(f"unet.{layer}.weight") / root
        factor = copies if kind.startswith("A") else root
        groups.append({"params": [parameter], "lr": factor * learning_rate})
    return groups


class _AsDiffusers(nn.Module):
    """The narrow UNet, called as the trainer calls diffusers' one."""

    def __init__(self, unet: nn.Module) -> None:
        super().__init__()
        self.unet = unet

    def forward(
        self, x: torch.Tensor, steps: torch.Tensor, encoder_hidden_states: torch.Tensor, **others: object
    ) -> tuple[torch.Tensor]:
        return (self.unet(x, steps, encoder_hidden_states),)


def with_lora(nets: Narrow, name: str, seed: int, learning_rate: float) -> Narrow:
    """The nets after STEPS steps on the subject *name*, their LoRA's running average in the UNet."""
    from trainer.base.conditioning import Conditioning
    from trainer.base.sd.denoiser import DiffusersUNet
    from trainer.base.sd.families import SD1
    from trainer.base.sd.layout import LdmLayout
    from trainer.base.sd.schedule import make_noise_scheduler
    from trainer.base.sd.target_layers import target_layers
    from trainer.config import TrainConfig
    from trainer.learn.adapter import inject
    from trainer.learn.data import TrainingData, make_micro_step
    from trainer.learn.ema import AdapterAverage
    from trainer.learn.loss import batch_losses
    from trainer.preserve.class_images import ClassImages
    from trainer.preserve.priors import ClassPriors

    word = SUBJECTS[name].class_word
    plain, special = caption(word, None), f"a photo of ohwx {word}"
    config = TrainConfig(
        rank=SETTINGS["rank"], network_alpha=SETTINGS["network_alpha"], lora_targets=OPTIONS["lora_targets"],
        train_batch_size=SETTINGS["train_batch_size"], prior_loss_weight=SETTINGS["prior_loss_weight"], seed=seed,
    )  # fmt: skip
    unet = copy.deepcopy(nets.unet)
    parameters = inject(unet, config, target_layers(unet, config.lora_targets))
    average = AdapterAverage(parameters, OPTIONS["ema_decay"])
    optimizer = torch.optim.AdamW(parameter_groups(unet, learning_rate), weight_decay=0.0)
    with torch.no_grad():
        latents = nets.encoder(photos(name, "train"))
        context = {text: Conditioning(nets.text(token_ids([text]))) for text in (plain, special)}
    seeds = [CLASS_SEED + CLASS_IMAGES * seed + i for i in range(CLASS_IMAGES)]
    class_images = sample(nets.unet, nets.text, [plain] * CLASS_IMAGES, seeds, SAMPLE_STEPS, CLASS_CFG)
    kept = ClassImages(ClassPriors(class_images, plain, (), ""))
    data = TrainingData(latents, (special,) * len(latents), context, kept)
    layout = LdmLayout(SD1, {}, {}, {}, "the demo base")
    denoiser = DiffusersUNet(layout, make_noise_scheduler(alphas_cumprod(), "epsilon"), dict)
    for step in range(STEPS):
        micro_step = make_micro_step(data, config, denoiser, step, torch.device("cpu"))
        (batch,) = micro_step.batches
        loss = batch_losses(denoiser, _AsDiffusers(unet), batch, micro_step.terms, OPTIONS["snr_gamma"]).total
        optimizer.zero_grad()
        loss.backward()  # type: ignore[no-untyped-call]
        optimizer.step()
        average.update(step)
    for parameter, value in zip(parameters, average.average, strict=True):
        parameter.data.copy_(value)
    return replace(nets, unet=unet)


def row_of(nets: Narrow, judge: LoadedJudge, name: str, seed: int, learning_rate: float) -> dict[str, Any]:
    """One run's figures, as `measure_dreambooth` has them."""
    word = SUBJECTS[name].class_word
    plain, special = caption(word, None), f"a photo of ohwx {word}"
    trained = with_lora(nets, name, seed, learning_rate)

    def look(nets: Narrow, prompts: list[str], first: int) -> torch.Tensor:
        return draw(nets, prompts, list(range(first, first + len(prompts))), SAMPLE_STEPS, CFG)

    return figures_of(
        scale_of(judge, name, look(nets, [plain] * PICTURES, 100)),
        look(trained, [special] * PICTURES, 200),
        look(trained, [f"{special} {place(scene)}" for scene in SCENES_OF_PICTURES], 300),
        judge.look(look(trained, [plain] * PICTURES, 100)),
        word,
    )


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
