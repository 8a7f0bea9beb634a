"""Class images as PNG files for viewing."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path

import numpy as np
import torch
from comfy.model_patcher import ModelPatcher
from comfy.sd import VAE
from PIL import Image

from ..trainer.errors import SubjectBoothError
from ..trainer.files.storage import write_atomic
from ..trainer.preserve.priors import picture_hash
from .bridge import ComfyLatentCodec
from .host import stop_if_cancelled
from .weights import digest_of


class Album:
    """PNG files of class images, next to the latents they were decoded from; ``/view`` can serve them after a restart.

    Args:
        folder: the recipe's folder.
        model, vae: used for decoding; each VAE gets files of its own.
    """

    def __init__(self, folder: Path, model: ModelPatcher, vae: VAE) -> None:
        self._folder = folder
        self._codec = ComfyLatentCodec(model, vae)
        self._vae = digest_of(vae.patcher)[:8]

    def paths(self, pictures: Mapping[int, torch.Tensor], indices: Iterable[int], batch_size: int) -> dict[int, Path]:
        """The files of these images. Missing and damaged ones are decoded first."""
        paths = {i: self._folder / f"{picture_hash(pictures[i])[:32]}_{self._vae}.png" for i in indices}
        missing = [index for index, path in paths.items() if not _is_whole(path)]
        for start in range(0, len(missing), batch_size):
            stop_if_cancelled()
            batch = missing[start : start + batch_size]
            images = self._codec.decode(torch.stack([pictures[index] for index in batch]))  # [n, 3, h, w]
            for index, image in zip(batch, images, strict=True):
                _write_png(paths[index], image)
        return paths

    def read(self, paths: Sequence[Path]) -> torch.Tensor:
        """float32 [n, h, w, 3] in 0..1."""
        images = torch.empty(0)
        for number, path in enumerate(paths):
            with Image.open(path) as image:
                pixels = torch.from_numpy(np.array(image.convert("RGB")))
            if number == 0:  # filled in place: 200 images of 1024 px take 2.5 GB, and a second copy as much again
                images = torch.empty(len(paths), *pixels.shape)
            images[number] = pixels / 255.0
        return images


def _is_whole(path: Path) -> bool:
    try:
        with Image.open(path) as image:
            image.load()
        return True
    except (OSError, SyntaxError, ValueError):
        return False


def _write_png(path: Path, image: torch.Tensor) -> None:
    pixels = (image.permute(1, 2, 0) * 255.0).round().to(torch.uint8).numpy()
    try:
        write_atomic(path, lambda beside: Image.fromarray(pixels).save(beside))
    except OSError as error:
        raise SubjectBoothError(
            f"a class image cannot be written ({error.strerror or type(error).__name__})",
            "disk space and write permission in ComfyUI's output folder",
            "free some space, or start ComfyUI with another --output-directory",
        ) from error
