"""Random compositions: a randomly moved, rotated, scaled and flipped drawing on the background named in the caption.

Images are composed at 128 px with bilinear sampling and averaged down to 64 px, for smooth edges.
"""

from __future__ import annotations

import math
import random
from collections.abc import Callable
from dataclasses import dataclass

import torch
import torch.nn.functional as F

from .classes import BACKGROUNDS, CLASS_WORDS, COLORS, PATTERNS, SCENES
from .pictures import Library

SIZE = 64
_SUPER = 2
Change = Callable[[torch.Tensor, random.Random], torch.Tensor]
"""Augmentation: drawings, float32 [n, 4, s, s] with premultiplied alpha -> the same shape."""


@dataclass(frozen=True)
class Pose:
    """Placement of a drawing: side of its square and centre as fractions of the image's side; rotation in degrees."""

    scale: float
    x: float
    y: float
    degrees: float
    flip: bool


def random_pose(rng: random.Random) -> Pose:
    """A random training pose, which keeps the whole drawing inside the image."""
    scale = rng.uniform(0.72, 0.98)
    slack = max(0.0, (1 - scale * 0.88) / 2)
    return Pose(
        scale=scale,
        x=0.5 + rng.uniform(-slack, slack) * 0.7,
        y=0.5 + rng.uniform(-slack, slack) * 0.7,
        degrees=rng.uniform(-12, 12),
        flip=rng.random() < 0.5,
    )


def random_background(rng: random.Random) -> str:
    """A random background name, a colour in about three of four cases."""
    if rng.random() < 0.74:
        return rng.choice(tuple(COLORS))
    return rng.choice((*PATTERNS, *SCENES))


def paint(background: str, rng: random.Random, side: int) -> torch.Tensor:
    """Draw a background, float32 [3, side, side] in 0..1."""
    jitter = torch.tensor([rng.uniform(-0.025, 0.025) for _ in range(3)]).view(3, 1, 1)
    y, x = torch.meshgrid(torch.arange(side) / side, torch.arange(side) / side, indexing="ij")

    def flat(r: int, g: int, b: int) -> torch.Tensor:
        return (torch.tensor([r, g, b]) / 255).view(3, 1, 1).expand(3, side, side)

    if background in COLORS:
        return (flat(*COLORS[background]) + jitter).clamp(0, 1)
    shift_x, shift_y = rng.random(), rng.random()
    if background == "striped":
        mask = ((x * 4 + shift_x) % 1 < 0.5).float()
        picture = mask * flat(96, 156, 232) + (1 - mask) * flat(240, 244, 250)
    elif background == "checkered":
        mask = (((x * 4 + shift_x * 2) % 2 < 1) ^ ((y * 4 + shift_y * 2) % 2 < 1)).float()
        picture = mask * flat(120, 190, 140) + (1 - mask) * flat(236, 246, 236)
    elif background == "dotted":
        u, v = (x * 4 + shift_x) % 1 - 0.5, (y * 4 + shift_y) % 1 - 0.5
        mask = ((u * u + v * v).sqrt() < 0.27).float()
        picture = mask * flat(250, 250, 246) + (1 - mask) * flat(232, 112, 136)
    elif background == "beach":
        horizon = 0.55 + 0.1 * shift_y
        sea = (y > horizon - 0.13).float()
        sand = (y > horizon + 0.02 * torch.sin(6.3 * (x + shift_x))).float()
        picture = flat(150, 212, 246) * (1 - sea) + flat(40, 140, 200) * sea
        picture = picture * (1 - sand) + flat(238, 210, 150) * sand
    elif background == "grass":
        horizon = 0.5 + 0.1 * shift_y
        hill = (y > horizon + 0.04 * torch.sin(6.3 * (x + shift_x))).float()
        picture = flat(178, 224, 250) * (1 - hill) + flat(110, 188, 70) * hill
    elif background == "night":
        picture = flat(22, 26, 84) * (1 - y) + flat(62, 48, 130) * y
        for _ in range(10):
            sx, sy, radius = rng.random(), rng.random() * 0.9, rng.uniform(0.012, 0.022)
            star = (((x - sx) ** 2 + (y - sy) ** 2).sqrt() < radius).float()
            picture = picture * (1 - star) + flat(255, 246, 200) * star
    else:
        raise ValueError(f"unknown background {background!r}; known: {', '.join(BACKGROUNDS)}")
    return (picture + jitter).clamp(0, 1)


def place_drawings(drawings: torch.Tensor, poses: list[Pose], backgrounds: torch.Tensor) -> torch.Tensor:
    """Composite drawings onto backgrounds.

    drawings: float32 [n, 4, s, s], premultiplied alpha, 0..1. backgrounds: float32 [n, 3, h, h]. Returns [n, 3, h, h].
    """
    rows = []
    for pose in poses:
        # affine_grid maps output coordinates to input ones, both -1..1, so this is the inverse of the pose.
        angle, side = math.radians(pose.degrees), -1.0 if pose.flip else 1.0
        cos, sin = math.cos(angle) / pose.scale, math.sin(angle) / pose.scale
        dx, dy = 2 * pose.x - 1, 2 * pose.y - 1
        rows.append(
            [
                [side * cos, side * sin, -side * (cos * dx + sin * dy)],
                [-sin, cos, sin * dx - cos * dy],
            ]
        )
    grid = F.affine_grid(torch.tensor(rows), [len(poses), 4, *backgrounds.shape[-2:]], align_corners=False)
    placed = F.grid_sample(drawings, grid, mode="bilinear", padding_mode="zeros", align_corners=False)
    return placed[:, :3] + backgrounds * (1 - placed[:, 3:])


def premultiplied(pixels: torch.Tensor) -> torch.Tensor:
    """uint8 [n, s, s, 4] straight alpha -> float32 [n, 4, s, s] premultiplied, 0..1."""
    drawings = pixels.permute(0, 3, 1, 2).float() / 255
    return torch.cat([drawings[:, :3] * drawings[:, 3:], drawings[:, 3:]], 1)


@dataclass(frozen=True)
class Batch:
    """images: float32 [n, 3, 64, 64] in 0..1, with the labels of each."""

    images: torch.Tensor
    words: tuple[str, ...]
    styles: tuple[str, ...]
    backgrounds: tuple[str, ...]


class Composer:
    """Draws random compositions from a library: a uniformly random class, then a uniformly random style of it."""

    def __init__(self, library: Library) -> None:
        self.library = library
        self.pixels = torch.from_numpy(library.pixels)
        self.by_word = {
            word: [i for i, w in enumerate(library.words) if w == word] for word in CLASS_WORDS if word in library.words
        }

    def batch(
        self,
        rng: random.Random,
        count: int,
        words: list[str] | None = None,
        backgrounds: list[str] | None = None,
        poses: list[Pose] | None = None,
        change: Change | None = None,
    ) -> Batch:
        """*count* compositions; arguments not given are random.

        *change* augments the drawings before they are placed.
        """
        words = words or [rng.choice(tuple(self.by_word)) for _ in range(count)]
        backgrounds = backgrounds or [random_background(rng) for _ in range(count)]
        poses = poses or [random_pose(rng) for _ in range(count)]
        which = [rng.choice(self.by_word[word]) for word in words]
        images = self._compose(rng, which, poses, backgrounds, change)
        styles = tuple(self.library.styles[i] for i in which)
        return Batch(images, tuple(words), styles, tuple(backgrounds))

    def any_drawings(
        self,
        rng: random.Random,
        count: int,
        change: Change | None = None,
        backgrounds: list[str] | None = None,
    ) -> tuple[torch.Tensor, list[int]]:
        """*count* compositions of uniformly random drawings, float32 [count, 3, 64, 64], and the drawings' indices.

        *change* as in :meth:`batch`.
        """
        which = [rng.randrange(len(self.pixels)) for _ in range(count)]
        poses = [random_pose(rng) for _ in which]
        backgrounds = backgrounds or [random_background(rng) for _ in which]
        return self._compose(rng, which, poses, backgrounds, change), which

    def _compose(
        self,
        rng: random.Random,
        which: list[int],
        poses: list[Pose],
        backgrounds: list[str],
        change: Change | None,
    ) -> torch.Tensor:
        painted = torch.stack([paint(name, rng, SIZE * _SUPER) for name in backgrounds])
        drawings = premultiplied(self.pixels[which])  # only these, because a whole set takes 1 GB as floats
        if change is not None:
            drawings = change(drawings, rng)
        return F.avg_pool2d(place_drawings(drawings, poses, painted), _SUPER)
