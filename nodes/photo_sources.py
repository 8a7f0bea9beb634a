"""Sources of a subject's photos: uploads, a folder, a sample of the pack, or a connected IMAGE."""

from __future__ import annotations

import json
import os
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import folder_paths
import numpy as np
import torch

from ..trainer.errors import SubjectBoothError
from ..trainer.subject.notes import Note, sentences
from ..trainer.subject.photo import Photo
from ..trainer.subject.photo_edits import NAME as EDITS
from ..trainer.subject.photo_edits import PhotoEdit, parse_edits
from ..trainer.subject.photos import check_size, list_photos
from .host import stop_if_cancelled
from .safe_paths import inside

SAMPLES = Path(__file__).resolve().parent.parent / "demo" / "subjects"
NO_SAMPLE = "none"
MAX_PHOTOS = 1000


@dataclass(frozen=True)
class Source:
    """Where the photos come from; unused fields are empty."""

    names: tuple[str, ...]
    folder: str
    sample: str
    has_image: bool

    @classmethod
    def of(cls, images: Any, folder: Any, sample: Any, *, has_image: bool = False) -> Source:
        """From the raw widget values; linked inputs are None.

        Raises:
            SubjectBoothError: ``images`` is neither a name nor a list of names.
        """
        listed = [images] if isinstance(images, str) else [] if images is None else images
        if not isinstance(listed, list | tuple) or not all(isinstance(name, str) for name in listed):
            raise SubjectBoothError(
                f"images {str(images)[:80]}",
                "a list of file names",
                'send {"__value__": ["a.jpg", "b.jpg"]}',
                "images",
            )
        sample = "" if sample in (None, NO_SAMPLE) else str(sample)
        return cls(tuple(name for name in listed if name.strip()), str(folder or ""), sample, has_image)

    def check(self, *, may_be_none: bool = False) -> None:
        """Raise unless exactly one source is given (or none, if a linked input may still provide one)."""
        given = {"images": self.names, "folder": self.folder, "sample": self.sample, "image": self.has_image}
        used = [name for name, value in given.items() if value]
        if len(used) > 1:
            raise SubjectBoothError(
                f"photos come from {len(used)} sources: {' and '.join(used)}",
                "exactly one of images, folder, sample and image",
                "keep one; clear or disconnect the others",
            )
        if not used and not may_be_none:
            raise SubjectBoothError(
                "no photos were given",
                "exactly one of images, folder, sample and image",
                "upload 3 to 5 photos, choose a folder or a sample, or connect an IMAGE",
            )

    def paths(self) -> list[Path]:
        """Paths of the image files, each checked to be inside its folder.

        Raises:
            SubjectBoothError: a name leads outside, the folder has no images, the sample is unknown, or there are far
                too many files.
        """
        if self.sample:
            if self.sample not in samples():
                raise SubjectBoothError(
                    f"sample {self.sample[:60]!r}",
                    f"one of {', '.join(samples()) or 'none'}",
                    "choose one of them",
                    "sample",
                )
            return list_photos(SAMPLES / self.sample / "train")
        base = Path(folder_paths.get_input_directory())
        if self.folder:
            found = list_photos(inside(base, self.folder, "folder"))
            paths = [inside(base, str(path.relative_to(base.resolve())), "folder") for path in found]
        else:
            paths = [_input_file(name) for name in self.names]
        if len(paths) > MAX_PHOTOS:
            raise SubjectBoothError(
                f"{len(paths)} photos are too many",
                f"at most {MAX_PHOTOS}; 3 to 5 are enough",
                "choose the best few",
            )
        return paths

    def names_in_edits(self, paths: Sequence[Path]) -> list[str]:
        """What ``photo_edits`` calls the photos: uploads as in ``images``, others by their file names."""
        return list(self.names) if self.names else [path.name for path in paths]

    def sample_class_word(self) -> str:
        """The class word that comes with a sample; empty for other sources."""
        if not self.sample:
            return ""
        try:
            about = json.loads((SAMPLES / self.sample / "subject.json").read_text("utf-8"))
            return str(about["class_word"])
        except (OSError, ValueError, KeyError, TypeError):
            return ""


def edits_of(text: Any) -> dict[str, PhotoEdit]:
    """The edits in the widget's value.

    Workflows saved before this input have the name of the upload button, "image", in its place.

    Raises:
        SubjectBoothError: see :func:`trainer.subject.photo_edits.parse_edits`.
    """
    return parse_edits("" if text in (None, "image") else str(text))


def mask_of(edit: PhotoEdit) -> Path | None:
    """The file of a photo's mask, checked to be inside its folder; None without one.

    Raises:
        SubjectBoothError: the name leads outside, or the file is missing.
    """
    return _input_file(edit.mask, EDITS) if edit.mask else None


def _input_file(name: str, what: str = "images") -> Path:
    """The path of an uploaded file; ComfyUI writes ``name [output]`` for files in other folders."""
    plain, directory = folder_paths.annotated_filepath(name)
    path = inside(Path(directory or folder_paths.get_input_directory()), plain, what)
    try:
        is_there = path.is_file()
    except OSError:  # the name is too long for the file system
        is_there = False
    if not is_there:
        raise SubjectBoothError(
            f"{plain[:120]!r} was not found in ComfyUI's input folder",
            "uploaded photos" if what == "images" else "a mask of the mask editor",
            "upload it again" if what == "images" else "paint the mask again, or remove it",
            what,
        )
    return path


def photos_of_tensors(images: list[torch.Tensor], masks: list[torch.Tensor] | None) -> tuple[list[Photo], list[str]]:
    """Photos from IMAGEs [b, h, w, c] and MASKs [b, h, w] or [h, w].

    Raises:
        SubjectBoothError: wrong shapes, NaN or infinite values, or masks that do not match the images.
    """
    pictures = [picture for batch in images for picture in batch]
    flat = [m for batch in masks or [] for m in (batch.reshape(-1, *batch.shape[-2:]) if batch is not None else [])]
    notes: list[Note] = []
    if flat and len(flat) not in (1, len(pictures)):
        raise SubjectBoothError(
            f"there are {len(flat)} masks for {len(pictures)} photos",
            "one mask, or one per photo",
            "connect that many",
            "mask",
        )
    photos = []
    for index, picture in enumerate(pictures):
        stop_if_cancelled()
        name = f"image {index + 1}"
        if picture.ndim != 3 or picture.shape[-1] not in (1, 3, 4) or not torch.isfinite(picture).all():
            raise SubjectBoothError(
                f"{name} has the shape {tuple(picture.shape)}, or values that are NaN or infinite",
                "an image [height, width, 3] with values from 0 to 1",
                "check what is connected to image",
                "image",
            )
        values = picture.detach().to("cpu", torch.float32).clamp(0, 1).numpy()
        check_size((values.shape[1], values.shape[0]), name)
        mask = None
        if values.shape[-1] == 4:
            mask = values[..., 3]
            values = values[..., :3] * mask[..., None] + (1 - mask[..., None])
            if mask.min() < 1:
                notes.append(Note("white", name))
        elif values.shape[-1] == 1:
            values = values.repeat(3, axis=-1)
        if flat:
            wired = flat[index if len(flat) > 1 else 0].detach().to("cpu", torch.float32).clamp(0, 1).numpy()
            mask = _fitting_mask(wired, values.shape[:2], name, notes)
        pixels = np.rint(values * 255.0).astype(np.uint8)
        photos.append(Photo(pixels, None if mask is None or mask.min() == 1 else np.array(mask), "", name))
    return photos, sentences(notes)


def _fitting_mask(mask: np.ndarray, size: tuple[int, ...], name: str, notes: list[Note]) -> np.ndarray | None:
    if not (mask > 0).any():
        # LoadImage outputs an empty mask of 64 x 64 for a photo without transparency.
        notes.append(Note("empty mask", name))
        return None
    if mask.shape != size:
        raise SubjectBoothError(
            f"the mask of {name} is {mask.shape[1]}x{mask.shape[0]}, but the photo is {size[1]}x{size[0]}",
            "the same size",
            "connect the mask of this photo, or resize it",
            "mask",
        )
    return mask


def input_pictures() -> list[str]:
    """Names of the images directly in ComfyUI's input folder."""
    base = folder_paths.get_input_directory()
    files = [entry.name for entry in os.scandir(base) if entry.is_file()] if Path(base).is_dir() else []
    return sorted(folder_paths.filter_files_content_types(files, ["image"]))


def samples() -> list[str]:
    """Names of the sample subjects: folders with photos in ``train``."""
    if not SAMPLES.is_dir():
        return []
    return sorted(entry.name for entry in SAMPLES.iterdir() if (entry / "train").is_dir())
