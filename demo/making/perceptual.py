"""A perceptual distance between images (LPIPS, arXiv 1801.03924, with equal weights).

The features come from a small classifier of all drawings in the training sets. It has never seen the held-out set, and
is independent of the judge.
"""

from __future__ import annotations

import logging
import math
import random
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import nn

from . import files, parallel
from .compose import Composer
from .pictures import everything_drawn
from .rates import warm_cosine

logger = logging.getLogger("subjectbooth")


WIDTHS = (16, 32, 64, 96)
"""Channels at 64, 32, 16 and 8 px."""


class Eye(nn.Module):
    """Images [n, 3, 64, 64] in 0..1 -> feature maps at 64, 32, 16 and 8 px."""

    def __init__(self) -> None:
        super().__init__()
        stages, before = [], 3
        for i, width in enumerate(WIDTHS):
            first = nn.Conv2d(before, width, 3, 1 if i == 0 else 2, 1, bias=False)
            second = nn.Conv2d(width, width, 3, 1, 1, bias=False)
            norms = nn.BatchNorm2d(width), nn.BatchNorm2d(width)
            stages.append(nn.Sequential(first, norms[0], nn.ReLU(), second, norms[1], nn.ReLU()))
            before = width
        self.stages = nn.ModuleList(stages)

    def forward(self, images: torch.Tensor) -> list[torch.Tensor]:
        features, h = [], images * 2 - 1
        for stage in self.stages:
            h = stage(h)
            features.append(h)
        return features

    def distance(self, picture: torch.Tensor, target: torch.Tensor) -> torch.Tensor:
        """Mean squared difference of the features, normalised at each position, summed over the resolutions."""
        with torch.no_grad():
            wanted = [F.normalize(f, dim=1, eps=1e-3) for f in self(target)]
        total = picture.new_zeros(())
        for made, want in zip(self(picture), wanted, strict=True):
            total = total + (F.normalize(made, dim=1, eps=1e-3) - want).square().sum(1).mean()
        return total


def load_eye(path: Path) -> Eye:
    """Load the net saved by :func:`train_eye`, in eval mode."""
    eye = Eye()
    eye.load_state_dict(torch.load(path, weights_only=True))
    return eye.eval().requires_grad_(False)


def train_eye(packages: Path, path: Path, steps: int = 4000, workers: int = 2) -> None:
    """Train on random compositions and write the weights to *path*. An interrupted training starts again.

    Args:
        packages: the folder of the sets' packages.
    """
    parallel.run(_job, workers, str(packages), str(path), steps)


def _job(
    rank: int, world: int, packages: str, path: str, steps: int, batch: int = 32, lr: float = 2e-3, seed: int = 0
) -> None:
    torch.manual_seed(seed)
    pictures = everything_drawn(Path(packages))
    eye = Eye()
    rng = random.Random(f"eye {seed} {rank}")
    composer = Composer(pictures)
    head = nn.Linear(WIDTHS[-1] * 8 * 8, 128)
    names = nn.Linear(128, len(pictures.words), bias=False)
    trained = [*eye.parameters(), *head.parameters(), *names.parameters()]
    optimizer = torch.optim.AdamW(trained, lr=lr, weight_decay=0.02)
    running = math.log(len(pictures.words))
    for step in range(steps):
        for group in optimizer.param_groups:
            group["lr"] = lr * warm_cosine(step, step / steps)
        images, which = composer.any_drawings(rng, batch // world)
        embedding = F.normalize(head(eye(images)[-1].flatten(1)), dim=1)
        loss = F.cross_entropy(16 * embedding @ F.normalize(names.weight, dim=1).T, torch.tensor(which))
        optimizer.zero_grad()
        loss.backward()
        parallel.average_gradients(trained, world)
        nn.utils.clip_grad_norm_(trained, 1.0)
        optimizer.step()
        running += 0.02 * (loss.item() - running)
        if rank == 0 and (step + 1) % 200 == 0:
            logger.info("eye step %d: loss %.3f", step + 1, running)
    if rank == 0:
        files.save(Path(path), eye.state_dict())
