"""Train the UNet and the text encoder together on latents of random compositions."""

from __future__ import annotations

import copy
import logging
import random
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import nn

from . import files, parallel
from .classes import BACKGROUNDS, CLASS_WORDS, COLORS, RARE_TOKENS, STYLES, caption, place, random_caption
from .compose import SIZE, Change, Composer, random_background
from .muon import Muon
from .pictures import everything_drawn, library
from .rates import warm_cosine
from .recolour import recoloured, varied
from .schedule import STEPS, alphas_cumprod, sample
from .text import TextEncoder
from .train_autoencoder import load_autoencoder
from .unet import UNet
from .words import END, START, token_ids, vocabulary, word_ids

logger = logging.getLogger("subjectbooth")


FILLER = ("a", "an", "photo", "of", "on", "the", "at", "background")
"""Words without a visual meaning."""


@dataclass(frozen=True)
class DiffusionRun:
    """One training of UNet and text encoder. batch and captions are per process.

    *start_from*: the run to continue from. The text encoder is then frozen, with new embeddings of the rare tokens
    (:meth:`TextEncoder.restart_words`), and the UNet learns to ignore them.

    The share *any_drawing* of the captions names no class: their pictures show any drawing of the sets, in other
    colours and light, so that details that the base never saw are not taken for noise. With *varied_classes* half of
    the classes' own drawings are :func:`varied` to the same end. *styles* are the sets shown, *snr_cap* is that of
    :func:`loss_weights`.
    """

    name: str = "diffusion"
    start_from: str | None = None
    rare_share: float = 0.2
    any_drawing: float = 0.0
    varied_classes: bool = False
    styles: tuple[str, ...] = STYLES
    snr_cap: float = 5.0
    autoencoder: str = "autoencoder"
    steps: int = 15000
    minutes: float | None = None
    captions: int = 12
    pictures_per_caption: int = 2
    lr: float = 1.5e-3
    warmup: int = 200
    ema_decay: float = 0.999
    compile: bool = True
    workers: int = 2
    seed: int = 0


def loss_weights(snr_cap: float = 5.0) -> torch.Tensor:
    """float32 [1000], mean 1: the weight of the squared eps error at each time step.

    With uniform weights, the noisy steps, which decide the class, have almost no influence. 1/alpha_bar weights them as
    in v-prediction (Salimans and Ho 2022, clipped at 10); the cleanest steps are capped as in min-SNR (Hang et al.
    2023) with gamma *snr_cap*.
    """
    alphas = alphas_cumprod()
    snr = alphas / (1 - alphas)
    weights = (1 / alphas).clamp(max=10) * (snr_cap / snr).clamp(max=1)
    return weights / weights.mean()


OF_NO_CLASS = 128
"""Latents of any drawing that a pool holds for each background."""


class LatentPool:
    """Latents of compositions: several for every pair of class and background, a few of them replaced at every step.

    *anything*: also images of any drawing in other colours, whose class is None. *change* augments the drawings of the
    classes.
    """

    def __init__(
        self,
        composer: Composer,
        encoder: nn.Module,
        rng: random.Random,
        anything: Composer | None = None,
        change: Change | None = None,
    ) -> None:
        self.composer, self.encoder, self.rng, self.anything, self.change = composer, encoder, rng, anything, change
        self.slots: list[tuple[str | None, str]] = [
            (word, background)
            for word in CLASS_WORDS
            for background in BACKGROUNDS
            for _ in range(4 if background in COLORS else 3)
        ]
        if anything:
            self.slots += [(None, background) for background in BACKGROUNDS for _ in range(OF_NO_CLASS)]
        self.rows: dict[tuple[str | None, str], list[int]] = {}
        for row, pair in enumerate(self.slots):
            self.rows.setdefault(pair, []).append(row)
        self.latents = torch.empty(len(self.slots), 4, 8, 8)
        for start in range(0, len(self.slots), 64):
            self.fill(range(start, min(start + 64, len(self.slots))))

    @torch.no_grad()
    def fill(self, rows: range | list[int]) -> None:
        """Compose and encode these rows again."""
        images = torch.empty(len(rows), 3, SIZE, SIZE)
        known = [i for i, row in enumerate(rows) if self.slots[row][0] is not None]
        other = [i for i, row in enumerate(rows) if self.slots[row][0] is None]
        if known:
            words, backgrounds = zip(*(self.slots[rows[i]] for i in known), strict=True)
            images[known] = self.composer.batch(
                self.rng, len(known), list(words), list(backgrounds), change=self.change
            ).images
        if other and self.anything:
            names = [self.slots[rows[i]][1] for i in other]
            images[other] = self.anything.any_drawings(self.rng, len(other), recoloured, names)[0]
        self.latents[list(rows)] = self.encoder(images.contiguous(memory_format=torch.channels_last))

    def renew(self, count: int) -> None:
        """Replace *count* random rows."""
        self.fill(self.rng.sample(range(len(self.slots)), count))

    def draw(
        self, captions: int, each: int, rare_share: float, any_drawing: float = 0.0
    ) -> tuple[torch.Tensor, list[str]]:
        """Latents [captions * each, 4, 8, 8], grouped by caption, and the captions."""
        rows, texts = [], []
        for _ in range(captions):
            word, background = self.rng.choice(CLASS_WORDS), random_background(self.rng)
            if self.rng.random() < any_drawing:
                rows += self.rng.sample(self.rows[None, background], each)
                texts.append(f"a photo {place(background)}" if self.rng.random() < 0.5 else "")
                continue
            rows += self.rng.sample(self.rows[word, background], each)
            texts.append(random_caption(word, background, self.rng, rare_share))
        return self.latents[rows], texts


PREVIEW_WORDS = ("dog", "cat", "robot", "rocket", "clock", "unicorn", "octopus", "guitar")
PREVIEW_BACKGROUNDS = ("red", "blue", "white", "beach", "striped")


def preview(nets: nn.ModuleDict, decoder: nn.Module, path: Path) -> None:
    """Write a grid of PREVIEW_WORDS by PREVIEW_BACKGROUNDS."""
    from torchvision.utils import save_image

    texts = [caption(word, background) for word in PREVIEW_WORDS for background in PREVIEW_BACKGROUNDS]
    unet, text = nets["unet"], nets["text"]
    assert isinstance(unet, UNet) and isinstance(text, TextEncoder)
    pictures = decoder(sample(unet, text, texts, list(range(len(texts))), steps=20)).clamp(0, 1)
    save_image(pictures, path, nrow=2 * len(PREVIEW_BACKGROUNDS))


def _ids(phrases: Sequence[str]) -> list[int]:
    """The unique token ids of all words in *phrases*."""
    return sorted({i for phrase in phrases for word in phrase.split() for i in word_ids()[word]})


def make_optimizers(nets: nn.ModuleDict, lr: float, rank: int, world: int) -> list[torch.optim.Optimizer]:
    """Muon for the weights of inner layers; AdamW for first and last layers, embeddings, norms and biases."""
    ends = ("input_blocks.0.0.weight", "time_embed.0.weight", "out.2.weight", "embedding.weight")
    inner: list[nn.Parameter] = []
    rest: list[nn.Parameter] = []
    for name, p in nets.named_parameters():
        if p.requires_grad:
            (inner if p.dim() > 1 and not name.endswith(ends) else rest).append(p)
    return [
        torch.optim.AdamW(rest, lr=lr, betas=(0.9, 0.99), weight_decay=0.01, fused=True),
        *([Muon(inner, lr, rank=rank, world=world)] if inner else []),
    ]


def _job(rank: int, world: int, run: DiffusionRun, folder: str) -> None:
    work = Path(folder)
    path = work / f"{run.name}.pt"
    torch.manual_seed(run.seed)
    nets = nn.ModuleDict({"unet": UNet(), "text": TextEncoder(vocabulary())})
    nets["unet"].to(memory_format=torch.channels_last)  # type: ignore[call-overload]
    text_encoder = nets["text"]
    assert isinstance(text_encoder, TextEncoder)
    if run.start_from:
        nets.load_state_dict(torch.load(work / f"{run.start_from}.pt", weights_only=True)["ema"])
        text_encoder.restart_words(_ids(RARE_TOKENS), _ids(CLASS_WORDS))
        text_encoder.requires_grad_(False)
    else:
        text_encoder.start_as_bag_of_words(_ids(FILLER), (START, END))
    ema = copy.deepcopy(nets).requires_grad_(False)
    trained = [p for p in nets.parameters() if p.requires_grad]
    optimizers = make_optimizers(nets, run.lr, rank, world)
    step, spent = 0, 0.0
    if path.exists():
        state = torch.load(path, weights_only=True)
        nets.load_state_dict(state["nets"])
        ema.load_state_dict(state["ema"])
        for optimizer, saved in zip(optimizers, state.get("optimizers", ()), strict=False):
            optimizer.load_state_dict(saved)
        step, spent = state["step"], state["spent"]
    encoder, decoder = load_autoencoder(work, run.autoencoder)
    rng = random.Random(f"{run.seed} {rank} {step}")
    noise_source = torch.Generator().manual_seed(hash((run.seed, rank, step)) % 2**31)
    anything = Composer(everything_drawn(work / "npm", run.styles)) if run.any_drawing else None
    known = Composer(library(work / "npm", run.styles))
    pool = LatentPool(known, encoder, rng, anything, varied if run.varied_classes else None)
    if rank == 0:
        logger.info("%d latents a process, std %.3f", len(pool.latents), float(pool.latents.std()))
    unet = torch.compile(nets["unet"]) if run.compile else nets["unet"]
    text = torch.compile(nets["text"]) if run.compile else nets["text"]
    alphas, weights = alphas_cumprod(), loss_weights(run.snr_cap)
    clock = parallel.Clock(run.steps, run.minutes, spent)
    count = run.captions * run.pictures_per_caption
    running, running_plain = 1.0, 1.0
    while (progress := clock.progress(step)) < 1:
        lr = run.lr * warm_cosine(step, progress, run.warmup, floor=0.01)
        for optimizer in optimizers:
            optimizer.param_groups[0]["lr"] = lr
        if step % 10 == 0:
            pool.renew(16)
        latents, texts = pool.draw(run.captions, run.pictures_per_caption, run.rare_share, run.any_drawing)
        # Stratified over the batch: every batch sees the whole range of noise.
        spread = (torch.randperm(count, generator=noise_source) + torch.rand(count, generator=noise_source)) / count
        times = (spread * STEPS).long().clamp(max=STEPS - 1)
        noise = torch.randn(latents.shape, generator=noise_source)
        level = alphas[times].view(-1, 1, 1, 1)
        noisy = (level.sqrt() * latents + (1 - level).sqrt() * noise).contiguous(memory_format=torch.channels_last)
        errors = (unet(noisy, times, text(token_ids(texts))) - noise).square().flatten(1).mean(1)
        loss = (errors * weights[times]).mean()
        nets.zero_grad(set_to_none=True)
        loss.backward()
        parallel.average_gradients(trained, world)
        nn.utils.clip_grad_norm_(trained, 1.0)
        for optimizer in optimizers:
            optimizer.step()
        step += 1
        decay = min(run.ema_decay, (1 + step) / (10 + step))
        with torch.no_grad():
            torch._foreach_lerp_(list(ema.parameters()), [p.detach() for p in nets.parameters()], 1 - decay)
        running += 0.01 * (loss.item() - running)
        running_plain += 0.01 * (errors.mean().item() - running_plain)
        if rank == 0 and step % 100 == 0:
            logger.info(
                "step %d %.0f s: loss %.4f (plain eps %.4f), lr %.1e, done %.1f %%",
                step, clock.seconds(), running, running_plain, lr, 100 * progress,
            )  # fmt: skip
        if rank == 0 and step % 500 == 0:
            _save(path, nets, ema, optimizers, step, clock)
            preview(ema, decoder, work / f"preview-{step:05d}.png")
    if rank == 0:
        _save(path, nets, ema, optimizers, step, clock)
        preview(ema, decoder, work / "preview-final.png")


def _save(
    path: Path,
    nets: nn.ModuleDict,
    ema: nn.ModuleDict,
    optimizers: Sequence[torch.optim.Optimizer],
    step: int,
    clock: parallel.Clock,
) -> None:
    state: dict[str, Any] = {
        "nets": nets.state_dict(),
        "ema": ema.state_dict(),
        "optimizers": [optimizer.state_dict() for optimizer in optimizers],
    }
    files.save(path, {**state, "step": step, "spent": clock.seconds()})


def train_diffusion(run: DiffusionRun, folder: Path) -> Path:
    """Train or resume *run* in *folder*; returns the path of the saved state."""
    parallel.run(_job, run.workers, run, str(folder))
    return folder / f"{run.name}.pt"
