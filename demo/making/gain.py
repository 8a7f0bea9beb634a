"""The gain, a measure of subject fidelity, and its upper limits due to the base's autoencoder and UNet.

The gain is the similarity to the training photos, scaled so that 0 is the plain class and 1 is held-out photos of the
subject.
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
"""Images per prompt. With only six, chance alone changes the mean by a few hundredths."""
SAMPLE_STEPS, CFG = 15, 2.0
NOISED_TO = (50, 100, 200, 400)


@dataclass(frozen=True)
class Scale:
    """One subject's scale: mean cosine similarities to *centre*, its training photos' mean embedding, for 0 and 1."""

    judge: LoadedJudge
    centre: torch.Tensor
    base: float
    top: float

    def gain(self, pictures: torch.Tensor) -> float:
        """The gain of images float32 [n, 3, 64, 64] in 0..1."""
        return (_similarity(self.judge, pictures, self.centre) - self.base) / (self.top - self.base)


def scale_of(judge: LoadedJudge, name: str, before: torch.Tensor) -> Scale:
    """The scale of the subject *name*; *before*: images of its class from the untrained base."""
    centre = torch.nn.functional.normalize(judge.classify(photos(name, "train")).embedding.mean(0), dim=0)
    base = _similarity(judge, before, centre)
    return Scale(judge, centre, base, _similarity(judge, photos(name, "heldout"), centre))


def _similarity(judge: LoadedJudge, pictures: torch.Tensor, centre: torch.Tensor) -> float:
    return float((judge.classify(pictures).embedding @ centre).mean())


def photos(name: str, group: str) -> torch.Tensor:
    """A subject's photos, float32 [n, 3, 64, 64]; *group* is 'train' or 'heldout'."""
    return torch.stack([pixels(path.read_bytes()) for path in sorted(photos_folder(name, group).glob("*.png"))])


def measure_ceilings(nets: Narrow, judge: LoadedJudge) -> Figures:
    """The gain of held-out photos after encoding and decoding them."""
    return _summary({name: scale.gain(_decoded(nets, latents)) for name, latents, _, scale in _subjects(nets, judge)})


def measure_details(nets: Narrow, judge: LoadedJudge) -> Figures:
    """The gain of held-out photos whose latents were noised to a time step and denoised by the base.

    A base trained only on its own drawings treats new details in a photo as noise, which a LoRA has to unlearn.
    """
    gains: dict[int, dict[str, float]] = {step: {} for step in NOISED_TO}
    for name, latents, plain, scale in _subjects(nets, judge):
        for step in NOISED_TO:
            gains[step][name] = scale.gain(_decoded(nets, noised_and_denoised(nets, latents, plain, step)))
    return {f"noised_to_{step}": _summary(of_each) for step, of_each in gains.items()}


@torch.no_grad()
def noised_and_denoised(nets: Narrow, latents: torch.Tensor, plain: str, step: int) -> torch.Tensor:
    """Latents [n, 4, 8, 8] noised to *step* and denoised by Euler steps with the caption *plain*, without guidance."""
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
