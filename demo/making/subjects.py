"""The sample subjects: images of drawings from the held-out set, in the role of a user's photos.

`demo/subjects/<name>/` has four training images (in `train`) and `subject.json`; both ship with the pack.
`demo/making/heldout/<name>/` has four others with other sizes, rotations and backgrounds, for evaluation only.
"""

from __future__ import annotations

import io
import json
import random
import tarfile
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image

from .compose import Pose, paint, place_drawings, premultiplied
from .pictures import PACKAGES, centred, package

SHIPPED = Path(__file__).resolve().parent.parent / "subjects"
HELDOUT = Path(__file__).resolve().parent / "heldout"
SIDE = 160

TRAIN_BACKGROUNDS = ("white", "gray", "yellow", "green")
HELDOUT_BACKGROUNDS = ("blue", "pink", "beach", "red")
TRAIN_POSES = (
    Pose(0.95, 0.50, 0.50, 0, False),
    Pose(0.76, 0.53, 0.55, -6, False),
    Pose(0.88, 0.48, 0.51, 8, False),
    Pose(0.92, 0.51, 0.48, -10, False),
)
HELDOUT_POSES = (
    Pose(0.84, 0.52, 0.50, 4, False),
    Pose(0.97, 0.50, 0.50, -4, False),
    Pose(0.80, 0.46, 0.54, 10, False),
    Pose(0.90, 0.49, 0.49, -8, False),
)


@dataclass(frozen=True)
class SubjectSet:
    """Code points of the drawings in the four training and the four held-out images."""

    class_word: str
    train: tuple[str, ...]
    heldout: tuple[str, ...]
    note: str = "one drawing in eight poses"


def _one(class_word: str, code: str) -> SubjectSet:
    return SubjectSet(class_word, (code,) * 4, (code,) * 4)


SUBJECTS: dict[str, SubjectSet] = {
    "dog": _one("dog", "1f436"),
    "cat": _one("cat", "1f431"),
    "clock": _one("clock", "23f0"),
    "robot": _one("robot", "1f916"),
    "rocket": _one("rocket", "1f680"),
    "penguin": _one("penguin", "1f427"),
    "teddy_bear": _one("teddy bear", "1f9f8"),
    "car": _one("car", "1f697"),
    "cat_faces": SubjectSet(
        "cat",
        ("1f431", "1f63a", "1f638", "1f63e"),
        ("1f63c", "1f63f", "1f63d", "1f63b"),
        "a cat with four expressions; the held-out pictures show four others",
    ),
    "monkey_gestures": SubjectSet(
        "monkey",
        ("1f435", "1f648", "1f649", "1f64a"),
        ("1f649", "1f64a", "1f435", "1f648"),
        "a monkey with four gestures; the held-out pictures show them in other poses and places",
    ),
}


def photos_folder(name: str, group: str) -> Path:
    """The folder of a subject's images; *group* is 'train' or 'heldout'."""
    return {"train": SHIPPED / name / "train", "heldout": HELDOUT / name}[group]


def fluent_drawing(code: str, folder: Path) -> np.ndarray:
    """One drawing of the held-out set, uint8 [128, 128, 4]."""
    with tarfile.open(package("fluent", folder)) as archive:
        handle = archive.extractfile(f"package/assets/{code}.webp")
        if handle is None:
            raise FileNotFoundError(code)
        return centred(Image.open(io.BytesIO(handle.read())))


def picture(drawing: np.ndarray, pose: Pose, background: str, side: int, rng: random.Random) -> torch.Tensor:
    """One composition, float32 [3, side, side] in 0..1."""
    painted = paint(background, rng, 2 * side)[None]
    placed = place_drawings(premultiplied(torch.from_numpy(drawing.copy())[None]), [pose], painted)
    return F.avg_pool2d(placed, 2)[0]


def write_subjects(work: Path) -> None:
    """Write the images and descriptions of all subjects."""
    for name, subject in SUBJECTS.items():
        rng = random.Random(name)
        groups = {
            "train": (subject.train, TRAIN_POSES, TRAIN_BACKGROUNDS),
            "heldout": (subject.heldout, HELDOUT_POSES, HELDOUT_BACKGROUNDS),
        }
        for group, (codes, poses, backgrounds) in groups.items():
            folder = photos_folder(name, group)
            folder.mkdir(parents=True, exist_ok=True)
            for i, (code, pose, background) in enumerate(zip(codes, poses, backgrounds, strict=True), 1):
                pixels = picture(fluent_drawing(code, work / "npm"), pose, background, SIDE, rng)
                array = (pixels.clamp(0, 1) * 255).round().byte().permute(1, 2, 0).numpy()
                Image.fromarray(array).save(folder / f"{i:02d}.png", optimize=True)
        description = {
            "class_word": subject.class_word,
            "licence": "MIT",
            "source": f"Microsoft Fluent Emoji (3D), npm {PACKAGES['fluent']}",
            "note": subject.note,
            "train_backgrounds": TRAIN_BACKGROUNDS,
            "heldout_backgrounds": HELDOUT_BACKGROUNDS,
        }
        path = SHIPPED / name / "subject.json"
        path.write_text(json.dumps(description, indent=1) + "\n", encoding="utf-8")
