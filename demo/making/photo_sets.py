"""Further sets of photos of the sample dog for experiments/open_list.toml: `python -m demo.making.photo_sets`.

In demo/subjects/dog the background and the pose change from photo to photo; here each set leaves one of them the same.
"""

from __future__ import annotations

import argparse
import random
from pathlib import Path

from PIL import Image

from .build import WORK
from .compose import Pose
from .subjects import SUBJECTS, TRAIN_BACKGROUNDS, TRAIN_POSES, fluent_drawing, picture

FOLDER = Path(__file__).resolve().parents[2] / "experiments" / "photos"
SIDE = 64
"""Pixels: the size of the demo base's pictures."""

STRONG_POSES = (
    Pose(0.95, 0.50, 0.50, 0, False),
    Pose(0.62, 0.62, 0.58, -35, False),
    Pose(0.72, 0.42, 0.54, 30, True),
    Pose(0.85, 0.52, 0.46, 20, False),
)

SETS: dict[str, tuple[tuple[Pose, ...], tuple[str, ...]]] = {
    "same-background": (TRAIN_POSES, ("gray",) * 4),
    "same-pose": (TRAIN_POSES[:1] * 4, TRAIN_BACKGROUNDS),
    "strong-poses": (STRONG_POSES, TRAIN_BACKGROUNDS),
}
"""Poses and backgrounds of the four photos of each set."""


def write_sets(work: Path = WORK, folder: Path = FOLDER) -> None:
    """Write the photos of all sets to *folder*; the drawings are downloaded to *work* if they are missing."""
    drawing = fluent_drawing(SUBJECTS["dog"].train[0], work / "npm")
    for name, (poses, backgrounds) in SETS.items():
        (folder / name).mkdir(parents=True, exist_ok=True)
        rng = random.Random(name)
        for number, (pose, background) in enumerate(zip(poses, backgrounds, strict=True), 1):
            pixels = picture(drawing, pose, background, SIDE, rng)
            array = (pixels.clamp(0, 1) * 255).round().byte().permute(1, 2, 0).numpy()
            Image.fromarray(array).save(folder / name / f"{number:02d}.png", optimize=True)


if __name__ == "__main__":
    parser = argparse.ArgumentParser(prog="python -m demo.making.photo_sets", description=__doc__)
    parser.add_argument("--work", type=Path, default=WORK, help="folder for the downloaded drawings")
    write_sets(parser.parse_args().work)
