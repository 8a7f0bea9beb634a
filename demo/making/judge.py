"""The judge: an ensemble of small classifiers, trained on compositions of all sets, including the held-out one.

It recognises the drawing in an image (and so its class and style) and the background. It is only used by
`demo.making.evaluate` and has never seen generated images. The scores depend on how a classifier was trained, up for
one subject and down for another (docs/demo-base-log.md), so the judge averages several that were trained differently.
"""

from __future__ import annotations

import logging
import random
from dataclasses import dataclass
from itertools import product
from pathlib import Path

import torch
import torch.nn.functional as F
from safetensors.torch import load_file, save_file
from torch import nn

from . import files
from .classes import BACKGROUNDS, CLASS_WORDS, MORE_STYLES
from .compose import Composer
from .pictures import Library, library
from .rates import warm_cosine
from .recolour import varied

logger = logging.getLogger("subjectbooth")

WEIGHTS = Path(__file__).parent / "weights" / "judge.safetensors"
ALL_STYLES = (*MORE_STYLES, "fluent")
EMBEDDING = 128


def _stage(inputs: int, outputs: int) -> list[nn.Module]:
    return [nn.Conv2d(inputs, outputs, 3, 2, 1, bias=False), nn.BatchNorm2d(outputs), nn.ReLU()]


class Judge(nn.Module):
    """Images [n, 3, 64, 64] in 0..1 -> logits of the drawing [n, drawings] and of the background [n, 16]."""

    def __init__(self, drawings: int) -> None:
        super().__init__()
        same = [nn.Conv2d(96, 96, 3, 1, 1, bias=False), nn.BatchNorm2d(96), nn.ReLU()]
        self.body = nn.Sequential(*_stage(3, 24), *_stage(24, 48), *_stage(48, 96), *same, *_stage(96, 192))
        self.embed = nn.Linear(192 * 16, EMBEDDING)
        self.drawing = nn.Linear(EMBEDDING, drawings, bias=False)
        self.background = nn.Linear(192 * 16, len(BACKGROUNDS))

    def forward(self, images: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        """Also returns the unit embedding [n, 128] from whose cosines the drawing's logits are computed."""
        h = self.body(images * 2 - 1).flatten(1)
        embedding = F.normalize(self.embed(h), dim=1)
        logits = 16 * embedding @ F.normalize(self.drawing.weight, dim=1).T
        return logits, self.background(h), embedding


@dataclass(frozen=True)
class Verdict:
    """The judge's results for n images. Probabilities are float32; embeddings are unit vectors."""

    word: tuple[str, ...]
    style: tuple[str, ...]
    background: tuple[str, ...]
    word_probability: torch.Tensor
    embedding: torch.Tensor
    drawing_probability: torch.Tensor


def drawing_names(words: tuple[str, ...], styles: tuple[str, ...]) -> list[tuple[str, str]]:
    """(class word, style) of each of the judge's outputs, in order."""
    return list(zip(words, styles, strict=True))


def _blurred(images: torch.Tensor, rng: random.Random) -> torch.Tensor:
    if rng.random() < 0.5:
        return images
    sigma = rng.uniform(0.4, 1.4)
    x = torch.arange(-3, 4)
    kernel = torch.exp(-(x**2) / (2 * sigma**2))
    kernel = (kernel / kernel.sum()).expand(3, 1, 7)
    images = F.conv2d(F.pad(images, (3, 3, 3, 3), mode="replicate"), kernel[:, :, None], groups=3)
    return F.conv2d(images, kernel[:, :, :, None], groups=3)


def _coarsened(images: torch.Tensor, rng: random.Random) -> torch.Tensor:
    """Scale down and up again, by the same factor for each group of eight images."""
    parts = []
    for part in images.split(8):
        if rng.random() < 0.75:
            low, high = (0.5, 1.0) if rng.random() < 0.3 else (0.35, 0.6)
            size = int(images.shape[-1] * rng.uniform(low, high))
            part = F.interpolate(F.interpolate(part, size=size, mode="area"), size=images.shape[-2:], mode="bicubic")
        parts.append(part)
    return torch.cat(parts)


WAYS = tuple(product((None, varied), (_blurred, _coarsened)))
"""Each net's augmentation of drawings and degradation of images (plus noise), so that it relies on shapes and not on
sharp pixel edges."""


def train_judge(work: Path) -> None:
    """Train one net for each of WAYS, each on 70,400 random compositions, and write the weights.

    Finished nets are saved in *work*, so that an interrupted training resumes with the next one.
    """
    pictures = library(work / "npm", ALL_STYLES)
    states: dict[str, torch.Tensor] = {}
    for way in range(len(WAYS)):
        path = work / f"judge-{way}.pt"
        if not path.exists():
            files.save(path, _trained(pictures, way))
        states |= {f"{way}.{key}": value for key, value in torch.load(path, weights_only=True).items()}
    with files.atomic_path(WEIGHTS) as part:
        save_file(states, part, {"words": "|".join(pictures.words), "styles": "|".join(pictures.styles)})


def _trained(
    pictures: Library, way: int, steps: int = 2200, batch: int = 32, lr: float = 2e-3
) -> dict[str, torch.Tensor]:
    """Half-precision weights of one net; *way* is its index in WAYS and its seed."""
    change, wear = WAYS[way]
    torch.manual_seed(way)
    rng = random.Random(f"judge {way}")
    composer = Composer(pictures)
    names = drawing_names(pictures.words, pictures.styles)
    index = {name: i for i, name in enumerate(names)}
    net = Judge(len(names))
    optimizer = torch.optim.AdamW(net.parameters(), lr=lr, weight_decay=0.02)
    running = 8.0
    for step in range(steps):
        for group in optimizer.param_groups:
            group["lr"] = lr * warm_cosine(step, step / steps)
        made = composer.batch(rng, batch, change=change)
        which = torch.tensor([index[pair] for pair in zip(made.words, made.styles, strict=True)])
        where = torch.tensor([BACKGROUNDS.index(name) for name in made.backgrounds])
        worn = wear(made.images, rng)
        drawing, background, _ = net(worn + rng.uniform(0, 0.05) * torch.randn_like(worn))
        loss = F.cross_entropy(drawing, which, label_smoothing=0.05) + 0.5 * F.cross_entropy(background, where)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        running += 0.02 * (loss.item() - running)
        if (step + 1) % 200 == 0:
            logger.info("judge %d step %d: loss %.3f", way, step + 1, running)
    state = {k: v.half() if v.is_floating_point() else v for k, v in net.state_dict().items()}
    return {k: v.contiguous() for k, v in state.items()}


class LoadedJudge:
    """The trained nets with the names of the drawings."""

    def __init__(self, path: Path = WEIGHTS) -> None:
        from safetensors import safe_open

        with safe_open(path, "pt") as handle:
            metadata = handle.metadata()
        self.names = drawing_names(tuple(metadata["words"].split("|")), tuple(metadata["styles"].split("|")))
        self.styles = tuple(dict.fromkeys(style for _, style in self.names))
        state = {k: v.float() if v.is_floating_point() else v for k, v in load_file(path).items()}
        ways = sorted({key.split(".")[0] for key in state})
        self.nets = nn.ModuleDict({way: Judge(len(self.names)) for way in ways})
        self.nets.load_state_dict(state)
        self.nets.eval().requires_grad_(False)
        self._words = torch.tensor([CLASS_WORDS.index(word) for word, _ in self.names])
        self._styles = torch.tensor([ALL_STYLES.index(style) for _, style in self.names])

    @torch.no_grad()
    def classify(self, images: torch.Tensor) -> Verdict:
        """Classify images float32 [n, 3, 64, 64] in 0..1."""
        parts = [self._averaged(part) for part in images.split(128)]
        drawing, background, embedding = (torch.cat(values) for values in zip(*parts, strict=True))
        words = torch.zeros(len(images), len(CLASS_WORDS)).index_add_(1, self._words, drawing)
        styles = torch.zeros(len(images), len(ALL_STYLES)).index_add_(1, self._styles, drawing)
        return Verdict(
            word=tuple(CLASS_WORDS[i] for i in words.argmax(1).tolist()),
            style=tuple(ALL_STYLES[i] for i in styles.argmax(1).tolist()),
            background=tuple(BACKGROUNDS[i] for i in background.argmax(1).tolist()),
            word_probability=words,
            embedding=embedding,
            drawing_probability=drawing,
        )

    def _averaged(self, images: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        """Mean probabilities of the drawing and of the background, and the embedding.

        The nets' embeddings are concatenated to one unit vector, so that a cosine is the mean of the nets' cosines.
        """
        drawings, backgrounds, embeddings = zip(*(net(images) for net in self.nets.values()), strict=True)
        return (
            torch.stack(drawings).softmax(2).mean(0),
            torch.stack(backgrounds).softmax(2).mean(0),
            F.normalize(torch.cat(embeddings, 1), dim=1),
        )
