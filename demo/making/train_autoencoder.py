"""Train the autoencoder: first from scratch, then wider versions initialised from it."""

from __future__ import annotations

import logging
import random
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import nn

from . import files, parallel
from .autoencoder import decoder_widths, encoder_widths, grow, make_decoder, make_encoder
from .compose import Composer
from .muon import Muon
from .perceptual import load_eye, train_eye
from .pictures import everything_drawn, library
from .rates import warm_cosine
from .recolour import recoloured

EYE = "eye.pt"
logger = logging.getLogger("subjectbooth")


@dataclass(frozen=True)
class AutoencoderRun:
    """One training of the autoencoder. *name* is the name of its saved state.

    *start_from*: the run to continue from, with the same number of channels or fewer. The UNet was trained on that
    run's latents, so the new ones must stay close: *keep_latents* is the weight of their squared distance.
    Alternatively, *encoder_only* freezes the decoder, which fixes the latents' meaning. *perceptual* is the weight of
    the perceptual loss. A fraction *any_drawing* of the images shows any drawing of the training sets, recoloured and
    relit.
    """

    name: str = "autoencoder"
    encoder_widths: tuple[int, ...] = (8, 16, 32, 64)
    decoder_widths: tuple[int, ...] = (8, 16, 32, 64)
    start_from: str | None = None
    keep_latents: float = 0.0
    encoder_only: bool = False
    perceptual: float = 0.0
    any_drawing: float = 0.0
    steps: int = 3000
    minutes: float | None = None
    batch: int = 8
    lr: float = 1.5e-3
    latent_noise: float = 0.05
    workers: int = 2
    seed: int = 0


def held_out(composer: Composer, count: int = 128) -> torch.Tensor:
    """Compositions with a seed that no training run uses, [count, 3, 64, 64]."""
    return composer.batch(random.Random("held out"), count).images


def psnr(picture: torch.Tensor, target: torch.Tensor) -> float:
    """Peak signal-to-noise ratio in dB, averaged over images with values 0..1."""
    error = (picture.clamp(0, 1) - target).square().flatten(1).mean(1)
    return float((-10 * torch.log10(error)).mean())


def load_autoencoder(work: Path, name: str) -> tuple[nn.Module, nn.Module]:
    """Encoder and decoder of a saved training state, in eval mode."""
    saved = torch.load(work / f"{name}.pt", weights_only=True)["nets"]
    parts = []
    for half in ("encoder", "decoder"):
        state = {k[8:]: v for k, v in saved.items() if k.startswith(f"{half}.")}
        net = make_encoder(encoder_widths(state)) if half == "encoder" else make_decoder(decoder_widths(state))
        net.load_state_dict(state)
        net.to(memory_format=torch.channels_last)  # type: ignore[call-overload]
        parts.append(net.eval().requires_grad_(False))
    return parts[0], parts[1]


def make_optimizers(nets: nn.Module, lr: float, rank: int, world: int) -> list[torch.optim.Optimizer]:
    """Muon for the inner convolutions; Adam for biases and the convolutions from and to pixels and latents."""
    inner: list[nn.Parameter] = []
    rest: list[nn.Parameter] = []
    for p in nets.parameters():
        (inner if p.dim() == 4 and p.shape[0] > 4 and p.shape[1] > 4 else rest).append(p)
    return [
        torch.optim.Adam(rest, lr=lr, betas=(0.9, 0.99)),
        Muon(inner, lr, weight_decay=0.0, rank=rank, world=world),
    ]


def _job(rank: int, world: int, run: AutoencoderRun, folder: str) -> None:
    work = Path(folder)
    path = work / f"{run.name}.pt"
    torch.manual_seed(run.seed)
    composer = Composer(library(work / "npm"))
    test = held_out(composer)
    anything = Composer(everything_drawn(work / "npm")) if run.any_drawing else composer
    eye = load_eye(work / EYE) if run.perceptual else None
    encoder, decoder = make_encoder(run.encoder_widths), make_decoder(run.decoder_widths)
    nets = nn.ModuleDict({"encoder": encoder, "decoder": decoder})
    nets.to(memory_format=torch.channels_last)  # type: ignore[call-overload]
    before: nn.Module | None = None
    if run.start_from:
        before, old_decoder = load_autoencoder(work, run.start_from)
        grow(encoder, before.state_dict())
        grow(decoder, old_decoder.state_dict())
    learner = encoder if run.encoder_only else nets
    trained = list(learner.parameters())
    decoder.requires_grad_(not run.encoder_only)
    optimizers = make_optimizers(learner, run.lr, rank, world)
    step, spent = 0, 0.0
    if path.exists():
        state = torch.load(path, weights_only=True)
        nets.load_state_dict(state["nets"])
        for optimizer, saved in zip(optimizers, state.get("optimizers", ()), strict=False):
            optimizer.load_state_dict(saved)
        step, spent = state["step"], state["spent"]
    clock = parallel.Clock(run.steps, run.minutes, spent)
    rng = random.Random(f"{run.seed} {rank} {step}")
    running = 0.0
    while (progress := clock.progress(step)) < 1:
        lr = run.lr * warm_cosine(step, progress, floor=0.02)
        for optimizer in optimizers:
            optimizer.param_groups[0]["lr"] = lr
        others = round(run.batch * run.any_drawing)
        images = composer.batch(rng, run.batch - others).images
        if others:
            images = torch.cat([images, anything.any_drawings(rng, others, recoloured)[0]])
        images = images.contiguous(memory_format=torch.channels_last)
        latents = encoder(images)
        decoded = decoder(latents + run.latent_noise * torch.randn_like(latents))
        loss = F.mse_loss(decoded, images) + 0.1 * F.l1_loss(decoded, images)
        if eye is not None:
            loss = loss + run.perceptual * eye.distance(decoded, images)
        running += 0.02 * (loss.item() - running)
        if before is None:
            # Latents of mean 0 and deviation 1 in each channel: what the noise schedule of SD expects.
            mean, var = latents.mean((0, 2, 3)), latents.var((0, 2, 3))
            loss = loss + 1e-3 * (mean.square() + (var - 1).square()).mean()
        elif run.keep_latents:
            loss = loss + run.keep_latents * F.mse_loss(latents, before(images))
        nets.zero_grad(set_to_none=True)
        loss.backward()
        parallel.average_gradients(trained, world)
        nn.utils.clip_grad_norm_(trained, 1.0)
        for optimizer in optimizers:
            optimizer.step()
        step += 1
        if step % 250 == 0 and rank == 0:
            with torch.no_grad():
                latents = encoder(test)
                quality = psnr(decoder(latents), test)
            logger.info(
                "%s step %d %.0f s: loss %.4f, held out %.2f dB, latent std %s, lr %.1e, done %.0f %%",
                run.name, step, clock.seconds(), running, quality,
                [round(float(s), 2) for s in latents.std((0, 2, 3))], lr, 100 * progress,
            )  # fmt: skip
            _save(path, nets, optimizers, step, clock)
    if rank == 0:
        with torch.no_grad():
            logger.info("%s finished: held out %.2f dB", run.name, psnr(decoder(encoder(test)), test))
        _save(path, nets, optimizers, step, clock)


def _save(
    path: Path,
    nets: nn.ModuleDict,
    optimizers: Sequence[torch.optim.Optimizer],
    step: int,
    clock: parallel.Clock,
) -> None:
    states = [optimizer.state_dict() for optimizer in optimizers]
    files.save(path, {"nets": nets.state_dict(), "optimizers": states, "step": step, "spent": clock.seconds()})


def train_autoencoder(run: AutoencoderRun, folder: Path) -> Path:
    """Train or resume *run* in *folder*; returns the path of the saved state."""
    if run.perceptual and not (folder / EYE).exists():
        train_eye(folder / "npm", folder / EYE, workers=run.workers)
    parallel.run(_job, run.workers, run, str(folder))
    return folder / f"{run.name}.pt"
