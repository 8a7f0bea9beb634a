"""What a gain is, and what of it the base alone allows: its autoencoder, and its UNet on details it never saw.

A gain is the share of the way from the class (0) to held-out photos of the subject (1), in similarity to the photos
that were trained on.
"""

from __future__ import annotations

from collections.abc import Callable
from statistics import mean

import torch

from .classes import caption
from .judge import LoadedJudge
from .measure import Figures, draw
from .measure_comfyui import pixels
from .narrow import Narrow
from .schedule import alphas_cumprod
from .subjects import FOLDER, SUBJECTS
from .words import token_ids

PICTURES = 16
"""Of each prompt: a gain is a mean, and over six pictures chance alone moves it by some hundredths."""
SAMPLE_STEPS, CFG = 15, 3.0
NOISED_TO = (50, 100, 200, 400)


def similarity(judge: LoadedJudge, pictures: torch.Tensor, training: torch.Tensor) -> float:
    """Mean cosine between the pictures' embeddings and the mean embedding of the subject's training pictures."""
    centre = torch.nn.functional.normalize(judge.look(training).embedding.mean(0), dim=0)
    return float((judge.look(pictures).embedding @ centre).mean())


def photos(name: str, group: str) -> torch.Tensor:
    """A subject's pictures, float32 [n, 3, 64, 64]; *group* is 'train' or 'heldout'."""
    return torch.stack([pixels(path.read_bytes()) for path in sorted((FOLDER / name / group).glob("*.png"))])


def measure_ceilings(nets: Narrow, judge: LoadedJudge) -> Figures:
    """The gain of held-out photos that only went through the autoencoder."""
    return _of_each(nets, judge, lambda latents, plain: latents)


def measure_details(nets: Narrow, judge: LoadedJudge) -> Figures:
    """The gain of held-out photos whose latents were noised to a time step and denoised from there by the base.

    A base that has seen its own drawings alone takes what is new in a photo for noise, and a LoRA has that to unlearn.
    """
    return {f"noised_to_{step}": _of_each(nets, judge, _noised_to(nets, step)) for step in NOISED_TO}


def _of_each(nets: Narrow, judge: LoadedJudge, change: Callable[[torch.Tensor, str], torch.Tensor]) -> Figures:
    """Gains of every subject's held-out photos, decoded from what *change* makes of latents and class's caption."""
    gains = {}
    for name, subject in SUBJECTS.items():
        plain = caption(subject.class_word, None)
        training, heldout = photos(name, "train"), photos(name, "heldout")
        before = draw(nets, [plain] * PICTURES, list(range(100, 100 + PICTURES)), SAMPLE_STEPS, CFG)
        base = similarity(judge, before, training)
        with torch.no_grad():
            again = nets.decoder(change(nets.encoder(heldout), plain)).clamp(0, 1)
        top = similarity(judge, heldout, training)
        gains[name] = round((similarity(judge, again, training) - base) / (top - base), 3)
    return {"mean": round(mean(gains.values()), 3), "worst": min(gains.values()), **gains}


def _noised_to(nets: Narrow, step: int) -> Callable[[torch.Tensor, str], torch.Tensor]:
    """Noise latents [n, 4, 8, 8] to *step* and take them back by Euler steps, without guidance or LoRA."""
    alphas = alphas_cumprod()
    levels = ((1 - alphas) / alphas).sqrt()

    def there_and_back(latents: torch.Tensor, plain: str) -> torch.Tensor:
        generator = torch.Generator().manual_seed(1)
        times = torch.linspace(step, 0, SAMPLE_STEPS).round().long()
        x = latents + levels[step] * torch.randn(latents.shape, generator=generator)
        context = nets.text(token_ids([plain] * len(x)))
        for time, after in zip(times, [*levels[times[1:]], torch.zeros(())], strict=True):
            sigma = levels[time]
            noise = nets.unet(x / (sigma**2 + 1).sqrt(), time.expand(len(x)), context)
            x = x + noise * (after - sigma)
        return x

    return there_and_back
