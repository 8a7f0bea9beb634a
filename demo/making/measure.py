"""Evaluation of the narrow model: judge, autoencoder, text to image, diversity, difference from the wide model."""

from __future__ import annotations

import random
from collections import Counter
from pathlib import Path
from typing import Any

import torch

from ..base import read_packed
from ..expand import wide_unet_weights
from .classes import BACKGROUNDS, CLASS_WORDS, caption
from .compose import Composer
from .judge import LoadedJudge, Verdict
from .narrow import Narrow
from .pictures import library
from .schedule import sample
from .train_autoencoder import psnr

Figures = dict[str, Any]


def share(flags: list[bool]) -> float:
    """Fraction of the flags that are true."""
    return sum(flags) / len(flags)


def measure_judge(judge: LoadedJudge, work: Path, count: int = 2000) -> Figures:
    """The judge's accuracy on held-out compositions."""
    batch = Composer(library(work / "npm", judge.styles)).batch(random.Random("judge, held out"), count)
    verdict = judge.classify(batch.images)
    return {
        "pictures": count,
        "class": share([a == b for a, b in zip(verdict.word, batch.words, strict=True)]),
        "style": share([a == b for a, b in zip(verdict.style, batch.styles, strict=True)]),
        "background": share([a == b for a, b in zip(verdict.background, batch.backgrounds, strict=True)]),
    }


def measure_autoencoder(nets: Narrow, work: Path, count: int = 256) -> Figures:
    """PSNR in dB on held-out compositions of the training sets, and on the held-out set."""
    figures: Figures = {"pictures": count}
    for name, styles in {"psnr": ("noto", "twemoji", "fxemoji"), "psnr_kept_out_set": ("fluent",)}.items():
        images = Composer(library(work / "npm", styles)).batch(random.Random("held out"), count).images
        with torch.no_grad():
            latents = nets.encoder(images)
            figures[name] = psnr(nets.decoder(latents), images)
        if name == "psnr":
            figures["latent_mean"], figures["latent_std"] = float(latents.mean()), float(latents.std())
    return figures


def draw(nets: Narrow, captions: list[str], seeds: list[int], steps: int = 30, cfg: float = 4.0) -> torch.Tensor:
    """Sample images, float32 [n, 3, 64, 64] in 0..1."""
    made = []
    for start in range(0, len(captions), 64):
        part = slice(start, start + 64)
        with torch.no_grad():
            latents = sample(nets.unet, nets.text, captions[part], seeds[part], steps, cfg)
            made.append(nets.decoder(latents).clamp(0, 1))
    return torch.cat(made)


def all_prompts(backgrounds_each: int = 10) -> list[tuple[str, str]]:
    """(class, background) for every class with *backgrounds_each* of the 16 backgrounds, all used equally."""
    pairs = []
    for i, word in enumerate(CLASS_WORDS):
        for j in range(backgrounds_each):
            pairs.append((word, BACKGROUNDS[(i * 7 + j * 5) % len(BACKGROUNDS)]))
    return pairs


def score(verdict: Verdict, pairs: list[tuple[str, str]]) -> Figures:
    """Accuracy of classes and backgrounds, and the classes with less than half of their images right."""
    right = [seen == word for seen, (word, _) in zip(verdict.word, pairs, strict=True)]
    tried = Counter(word for word, _ in pairs)
    hits = Counter(word for (word, _), hit in zip(pairs, right, strict=True) if hit)
    return {
        "pictures": len(pairs),
        "class": share(right),
        "background": share([seen == want for seen, (_, want) in zip(verdict.background, pairs, strict=True)]),
        "weak_classes": [word for word in tried if hits[word] < tried[word] / 2],
    }


def measure_text_to_image(nets: Narrow, judge: LoadedJudge, cfg: float = 4.0) -> Figures:
    """Text to image with 1,040 prompts: every class on ten backgrounds."""
    pairs = all_prompts()
    pictures = draw(nets, [caption(*pair) for pair in pairs], list(range(len(pairs))), cfg=cfg)
    return {"cfg": cfg, "steps": 30, **score(judge.classify(pictures), pairs)}


def measure_diversity(nets: Narrow, judge: LoadedJudge, seeds: int = 16) -> Figures:
    """Drawing styles among *seeds* images of each plain class prompt, counted only if the class is right."""
    words = [word for word in CLASS_WORDS for _ in range(seeds)]
    pictures = draw(nets, [caption(word, None) for word in words], list(range(len(words))), 20, cfg=5.0)
    verdict = judge.classify(pictures)
    styles: dict[str, set[str]] = {word: set() for word in CLASS_WORDS}
    for word, seen, style in zip(words, verdict.word, verdict.style, strict=True):
        if seen == word:
            styles[word].add(style)
    return {
        "seeds": seeds,
        "two_styles_or_more": share([len(found) >= 2 for found in styles.values()]),
        "style_shares": [f"{style} {count / len(words):.2f}" for style, count in Counter(verdict.style).most_common()],
    }


def measure_wide(nets: Narrow) -> Figures:
    """Largest difference between the narrow UNet and the wide one in diffusers, fp32, over noise levels."""
    from trainer.base.sd.layout import LdmLayout
    from trainer.base.sd.unet import build_unet

    weights = wide_unet_weights(read_packed())
    shapes = {name: value.shape for name, value in weights.items()}
    unet = build_unet(LdmLayout.of(shapes, "the demo base"), lambda: weights, torch.float32)
    generator = torch.Generator().manual_seed(0)
    x, steps = torch.randn(3, 4, 8, 8, generator=generator), torch.tensor([20, 500, 980])
    with torch.no_grad():
        context = nets.text(torch.tensor([[49406, 320, 1125, 539, 320, 1929] + [49407] * 71]).expand(3, -1))
        narrow = nets.unet(x, steps, context)
        full = unet(x, steps, context.repeat_interleave(8, 2)).sample
    return {
        "largest_difference": float((narrow - full).abs().max()),
        "scale": float(narrow.abs().max()),
        "unet_parameters_narrow": sum(p.numel() for p in nets.unet.parameters()),
        "unet_parameters_wide": sum(v.numel() for v in weights.values()),
    }
