"""Augmentation of drawings, so that the nets reproduce their input and not what they have memorised.

Trained only on the original colours, the autoencoder turned an unseen purple penguin black.
"""

from __future__ import annotations

import math
import random

import torch
import torch.nn.functional as F


def colour_matrix(rng: random.Random, widest: float = math.pi) -> torch.Tensor:
    """A random hue rotation of up to *widest* radians and change of saturation, [3, 3] on RGB. Grey stays grey.

    The rotation is about the grey axis (Rodrigues' formula).
    """
    angle = rng.uniform(-widest, widest)
    saturation = rng.uniform(0.6, 1.3)
    grey = torch.full((3, 3), 1 / 3)
    root = 1 / math.sqrt(3)
    cross = root * torch.tensor([[0.0, -1.0, 1.0], [1.0, 0.0, -1.0], [-1.0, 1.0, 0.0]])
    turn = math.cos(angle) * torch.eye(3) + (1 - math.cos(angle)) * grey + math.sin(angle) * cross
    return grey + saturation * (turn - grey)


def light(rng: random.Random, side: int) -> torch.Tensor:
    """A random smooth brightness map, 0.45 to 1.35, [side, side]."""
    y, x = torch.meshgrid(torch.linspace(-1, 1, side), torch.linspace(-1, 1, side), indexing="ij")
    angle, height = rng.uniform(0, 2 * math.pi), rng.uniform(0, 0.25)
    ramp = math.cos(angle) * x + math.sin(angle) * y
    dx, dy = rng.uniform(-0.6, 0.6), rng.uniform(-0.6, 0.6)
    spot = torch.exp(-((x - dx) ** 2 + (y - dy) ** 2) / rng.uniform(0.05, 0.4))
    return (rng.uniform(0.75, 1.1) + height * ramp + rng.uniform(-0.2, 0.3) * spot).clamp(0.45, 1.35)


def _turned(colours: torch.Tensor, matrix: torch.Tensor) -> torch.Tensor:
    """Apply a :func:`colour_matrix` to colours [3, h, w]; the result may exceed 0..1."""
    return torch.einsum("ij,jhw->ihw", matrix, colours)


def _drawing(colours: torch.Tensor, alpha: torch.Tensor) -> torch.Tensor:
    """A drawing [4, h, w]; premultiplied colours are clamped to 0..alpha."""
    return torch.cat([torch.minimum(colours.clamp(min=0), alpha), alpha])


def recoloured(drawings: torch.Tensor, rng: random.Random) -> torch.Tensor:
    """Recolour half of the drawings, lighten the dark parts of a third with a colour, and relight two thirds.

    drawings: float32 [n, 4, s, s], premultiplied alpha, 0..1; the result has the same shape.
    """
    changed = []
    for drawing in drawings:
        colours, alpha = drawing[:3], drawing[3:]
        if rng.random() < 0.5:
            colours = _turned(colours, colour_matrix(rng))
        if rng.random() < 1 / 3:  # a hue rotation does not change black
            dark = torch.tensor([rng.uniform(0, 0.7) for _ in range(3)]).view(3, 1, 1)
            colours = colours + dark * (alpha - colours)
        if rng.random() < 2 / 3:
            colours = colours * light(rng, drawing.shape[-1])
        changed.append(_drawing(colours, alpha))
    return torch.stack(changed)


BEND = 0.12
"""Maximum shift of a knot in :func:`warped`, in halves of the drawing's side; up to a third more between knots."""


def warped(drawings: torch.Tensor, rng: random.Random) -> torch.Tensor:
    """Warp each drawing with a random smooth displacement (4 x 4 knots); shapes and values as in :func:`recoloured`."""
    count, side = len(drawings), drawings.shape[-1]
    knots = torch.tensor([[rng.uniform(-BEND, BEND) for _ in range(2 * 16)] for _ in range(count)])
    shift = F.interpolate(knots.view(count, 2, 4, 4), size=side, mode="bicubic", align_corners=True)
    upright = F.affine_grid(torch.eye(2, 3).expand(count, 2, 3), [count, 1, side, side], align_corners=False)
    grid = upright + shift.permute(0, 2, 3, 1)
    return F.grid_sample(drawings, grid, mode="bilinear", padding_mode="zeros", align_corners=False)


def varied(drawings: torch.Tensor, rng: random.Random) -> torch.Tensor:
    """Imitate other artists: half of the drawings stay the same, half are warped, slightly recoloured and relit.

    Shapes and values as in :func:`recoloured`. Hues change by half a radian at most, to stay true to the class.
    """
    changed = list(drawings)
    for index in [i for i in range(len(drawings)) if rng.random() < 0.5]:
        drawing = warped(drawings[index : index + 1], rng)[0]
        colours, alpha = drawing[:3], drawing[3:]
        colours = _turned(colours, colour_matrix(rng, 0.5)) * light(rng, drawing.shape[-1])
        changed[index] = _drawing(colours, alpha)
    return torch.stack(changed)
