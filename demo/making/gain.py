"""What a gain is, and what of it the base alone allows: its autoencoder, and its UNet on details it never saw.

A gain is the share of the way from the class (0) to held-out photos of the subject (1), in similarity to the photos
that were trained on.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from statistics import mean

import torch

from .classes import caption
from .judge import LoadedJudge
from .measure import Figures, draw
from .measure_comfyui import pixels
from .narrow import Narrow
from .schedule import noise_levels
from .subjects import SUBJECTS, photos_folder
from .words import token_ids

PICTURES = 16
"""Of each prompt: a gain is a mean, and over six pictures chance alone moves it by some hundredths."""
SAMPLE_STEPS, CFG = 15, 2.0
NOISED_TO = (50, 100, 200, 400)


@dataclass(frozen=True)
class Scale:
    """One subject's gain: where 0 and 1 lie, as mean cosines to the mean embedding of its training photos, *centre*."""

    judge: LoadedJudge
    centre: torch.Tensor
    base: float
    top: float

    def gain(self, pictures: torch.Tensor) -> float:
        """Of pictures float32 [n, 3, 64, 64] in 0..1."""
        return (_similarity(self.judge, pictures, self.centre) - self.base) / (self.top - self.base)


def scale_of(judge: LoadedJudge, name: str, before: torch.Tensor) -> Scale:
    """The scale of the subject *name*, whose class the base draws as in *before*."""
    centre = torch.nn.functional.normalize(judge.look(photos(name, "train")).embedding.mean(0), dim=0)
    base = _similarity(judge, before, centre)
    return Scale(judge, centre, base, _similarity(judge, photos(name, "heldout"), centre))


def _similarity(judge: LoadedJudge, pictures: torch.Tensor, centre: torch.Tensor) -> float:
    return float((judge.look(pictures).embedding @ centre).mean())


def photos(name: str, group: str) -> torch.Tensor:
    """A subject's pictures, float32 [n, 3, 64, 64]; *group* is 'train' or 'heldout'."""
    return torch.stack([pixels(path.read_bytes()) for path in sorted(photos_folder(name, group).glob("*.png"))])


def measure_ceilings(nets: Narrow, judge: LoadedJudge) -> Figures:
    """The gain of held-out photos that only went through the autoencoder."""
    return _summary({name: scale.gain(_decoded(nets, latents)) for name, latents, _, scale in _subjects(nets, judge)})


def measure_details(nets: Narrow, judge: LoadedJudge) -> Figures:
    """The gain of held-out photos whose latents were noised to a time step and denoised from there by the base.

    A base that has seen its own drawings alone takes what is new in a photo for noise, and a LoRA has that to unlearn.
    """
    gains: dict[int, dict[str, float]] = {step: {} for step in NOISED_TO}
    for name, latents, plain, scale in _subjects(nets, judge):
        for step in NOISED_TO:
            gains[step][name] = scale.gain(_decoded(nets, noised_and_denoised(nets, latents, plain, step)))
    return {f"noised_to_{step}": _summary(of_each) for step, of_each in gains.items()}


@torch.no_grad()
def noised_and_denoised(nets: Narrow, latents: torch.Tensor, plain: str, step: int) -> torch.Tensor:
    """Latents [n, 4, 8, 8] noised to *step* and taken back by Euler steps under the caption *plain*, no guidance."""
    levels = noise_levels()
    generator = torch.Generator().manual_seed(1)
    times = torch.linspace(step, 0, SAMPLE_STEPS).round().long()
    x = latents + levels[step] * torch.randn(latents.shape, generator=generator)
    context = nets.text(token_ids([plain] * len(x)))
    for time, after in zip(times, [*levels[times[1:]], torch.zeros(())], strict=True):
        sigma = levels[time]
        noise = nets.unet(x / (sigma**2 + 1).sqrt(), time.expand(len(x)), context)
        x = x + noise * (after - sigma)
    return x


def _subjects(nets: Narrow, judge: LoadedJudge) -> Iterator[tuple[str, torch.Tensor, str, Scale]]:
    """Each subject's name, latents of its held-out photos, class caption and scale."""
    for name, subject in SUBJECTS.items():
        plain = caption(subject.class_word, None)
        before = draw(nets, [plain] * PICTURES, list(range(100, 100 + PICTURES)), SAMPLE_STEPS, CFG)
        with torch.no_grad():
            latents = nets.encoder(photos(name, "heldout"))
        yield name, latents, plain, scale_of(judge, name, before)


@torch.no_grad()
def _decoded(nets: Narrow, latents: torch.Tensor) -> torch.Tensor:
    pictures: torch.Tensor = nets.decoder(latents).clamp(0, 1)
    return pictures


def _summary(gains: dict[str, float]) -> Figures:
    rounded = {name: round(gain, 3) for name, gain in gains.items()}
    return {"mean": round(mean(rounded.values()), 3), "worst": min(rounded.values()), **rounded}
