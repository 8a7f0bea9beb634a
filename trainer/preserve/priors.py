"""Class images as training takes them, and the store on disk that keeps every finished one."""

from __future__ import annotations

import contextlib
import dataclasses
import logging
import re
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch

from ..errors import SubjectBoothError
from ..files.safetensors_file import read_checked, write_checked
from ..files.storage import canonical_json, disk_errors, remove_temp_files, sha256_of, write_atomic

logger = logging.getLogger("subjectbooth")

FORMAT_VERSION = 1
"""Part of every recipe's key: raised when the same recipe would no longer give the same pictures."""
MIN_HASH_DIGITS = 8


@dataclass(frozen=True)
class ClassPriors:
    """Pictures of the class, made by the base itself, that keep it from forgetting what the class looks like.

    Attributes:
        latents: float32 [n, c, h, w], on the CPU, in the training space.
        prompt: the class prompt they were made with.
        hashes: one content hash a picture.
        digest: SHA-256 over latents and prompt.
        store: name of the folder that keeps them, so that they are not cleaned away while a LoRA needs them.
        family: of the base that made them; empty when it is not known.
        base_digest: of that base, by :attr:`PriorRecipe.base_digest`; empty likewise.
    """

    latents: torch.Tensor
    prompt: str
    hashes: tuple[str, ...]
    digest: str
    store: str = ""
    family: str = ""
    base_digest: str = ""


@dataclass(frozen=True)
class PriorRecipe:
    """Everything that makes picture number i what it is. How many are wanted is no part of it.

    Attributes:
        base_digest: over the weights, the noise schedule and the prompt encoder.
        prompt, negative: as they are encoded.
        width, height: pixels.
        sampler_name, scheduler, steps, cfg: of the sampler.
        seed: picture i starts from the noise of ``seed + i``.
        grouping: pictures in a batch where the sampler draws noise for the batch as a whole, so that a picture
            depends on its neighbours; 0 where it does not.
    """

    base_digest: str
    prompt: str
    negative: str
    width: int
    height: int
    sampler_name: str
    scheduler: str
    steps: int
    cfg: float
    seed: int
    grouping: int

    @property
    def key(self) -> str:
        """64 hex digits that change with any of it."""
        return sha256_of(canonical_json({"format": FORMAT_VERSION, **dataclasses.asdict(self)}))

    def seed_of(self, index: int) -> int:
        """The noise seed of picture ``index``: that of the same picture made alone by any sampler node."""
        return (self.seed + index) % 2**64


class PriorStore:
    """The finished pictures of one recipe: a folder with one checked file a batch, each written in one step.

    A batch is whole or not there, so a run that was cut off at any moment goes on in the same batches as one that was
    not, and ends with the same bits.

    Args:
        root: the folder that holds all recipes' folders.
        recipe: what the pictures are made by.
        latent_factor: pixels a side of one latent of that base.
    """

    def __init__(self, root: Path, recipe: PriorRecipe, latent_factor: int = 8) -> None:
        words = re.sub(r"[^\w-]+", "_", recipe.prompt).strip("_")[:40]
        self.recipe, self._latent_factor = recipe, latent_factor
        self.path = root / f"{words}_{recipe.key[:16]}"

    def load(self) -> tuple[dict[int, torch.Tensor], list[str]]:
        """Latents [4, h/8, w/8] by picture number, and sentences about files that were damaged.

        A damaged file is deleted: its pictures are made anew.

        Raises:
            SubjectBoothError: the folder cannot be read.
        """
        pictures: dict[int, torch.Tensor] = {}
        notes = []
        # A file that cannot be read now (another program has it, the drive is away) may be whole, and stays.
        with disk_errors("class images cannot be read", self.path):
            for path in sorted(self.path.glob("*.safetensors")):
                if path.name.startswith("."):  # being written by somebody else
                    continue
                try:
                    found = self._read(path)
                except FileNotFoundError:
                    continue
                except SubjectBoothError as error:
                    logger.warning("%s", error)
                    notes.append(f"{path.name} was damaged; its class images are made again.")
                    with contextlib.suppress(OSError):
                        path.unlink()
                    continue
                pictures = {**found, **pictures}
        return pictures, notes

    def save(self, indices: Sequence[int], latents: torch.Tensor) -> None:
        """Keep a finished batch.

        Args:
            indices: the pictures' numbers.
            latents: float32 [n, c, h, w].

        Raises:
            SubjectBoothError: the values are not numbers, or the disk does not take them.
        """
        if not torch.isfinite(latents).all():
            raise SubjectBoothError(
                f"class images {indices[0] + 1} to {indices[-1] + 1} came out as values that are not numbers (NaN)",
                "a base model that samples",
                "try the sampling settings with a KSampler first; half precision is the usual cause",
            )
        path = self.path / f"{indices[0]:05d}-{indices[-1]:05d}.safetensors"
        about = self.path / "recipe.json"
        with disk_errors("class images cannot be kept", self.path):
            if not about.is_file():
                write_atomic(about, canonical_json(dataclasses.asdict(self.recipe)))
            write_checked(path, {"latents": latents}, {"key": self.recipe.key, "indices": list(indices)})

    def _read(self, path: Path) -> dict[int, torch.Tensor]:
        tensors, state = read_checked(path)
        latents = tensors["latents"] if isinstance(state, dict) and "latents" in tensors else None
        size = (self.recipe.height // self._latent_factor, self.recipe.width // self._latent_factor)
        if latents is None or state["key"] != self.recipe.key or latents.shape[2:] != size:  # type: ignore[index]
            raise SubjectBoothError(
                "class images of another recipe", f"those of {self.path.name}", "delete the file", path.name
            )
        return dict(zip(state["indices"], latents, strict=True))  # type: ignore[index]


def batches_to_make(have: Collection[int], count: int, batch_size: int, grouping: int) -> list[tuple[int, ...]]:
    """Which pictures are still to be made, in the batches they are to be made in.

    Args:
        have: numbers of the pictures that are there.
        count: how many are wanted: numbers 0 to ``count - 1``.
        batch_size: pictures at once.
        grouping: :attr:`PriorRecipe.grouping`; where it is not 0 only whole, aligned batches give the same pictures, so
            the last one may go past ``count``.
    """
    if grouping:
        starts = range(0, count, grouping)
        groups = [tuple(range(start, start + grouping)) for start in starts]
        return [group for group in groups if not set(group) & set(range(count)) <= set(have)]
    missing = [index for index in range(count) if index not in have]
    return [tuple(missing[start : start + batch_size]) for start in range(0, len(missing), batch_size)]


def make_missing(
    store: PriorStore,
    pictures: dict[int, torch.Tensor],
    count: int,
    batch_size: int,
    sample: Callable[[tuple[int, ...]], torch.Tensor],
) -> Iterator[tuple[int, ...]]:
    """Make what is missing, batch by batch; each is on the disk before the generator yields its numbers.

    Args:
        store: where they are kept.
        pictures: those that are there; the new ones are added to it.
        count: how many are wanted.
        batch_size: pictures at once.
        sample: picture numbers -> latents float32 [n, c, h, w] in the training space.

    Raises:
        SubjectBoothError: the disk does not take them.
    """
    batches = batches_to_make(pictures.keys(), count, batch_size, store.recipe.grouping)
    # No lock: two programs at once make the same files, each in one step, so both end with the same bits.
    remove_temp_files(store.path, older_than=3600)
    for batch in batches:
        latents = sample(batch)
        store.save(batch, latents)
        for index, latent in zip(batch, latents, strict=True):
            pictures.setdefault(index, latent)
        yield batch


def picture_hash(latents: torch.Tensor) -> str:
    """What a picture is known by, wherever it lies: SHA-256 over its latents."""
    return sha256_of(latents)


def parse_exclude(text: str) -> tuple[str, ...]:
    """Content hashes out of a text with blanks or commas between them.

    Raises:
        SubjectBoothError: something that cannot be the beginning of a hash.
    """
    found = tuple(part.lower() for part in re.split(r"[\s,;]+", text) if part)
    for part in found:
        if not re.fullmatch(rf"[0-9a-f]{{{MIN_HASH_DIGITS},64}}", part):
            raise SubjectBoothError(
                f"exclude has {part[:80]!r} in it",
                f"content hashes of class images ({MIN_HASH_DIGITS} to 64 hexadecimal digits)",
                "copy them from the list of class images, or empty exclude",
                "exclude",
            )
    return found


def split_excluded(
    pictures: Mapping[int, torch.Tensor], count: int, exclude: Sequence[str]
) -> tuple[dict[int, str], dict[int, str]]:
    """The hashes of the first ``count`` pictures by number: of those that are used, and of those left out."""
    hashes = {index: picture_hash(pictures[index]) for index in range(count)}
    left_out = {index: value for index, value in hashes.items() if value.startswith(tuple(exclude))}
    return {index: value for index, value in hashes.items() if index not in left_out}, left_out


def class_priors(
    pictures: Mapping[int, torch.Tensor],
    used: Mapping[int, str],
    store: PriorStore,
    family: str,
) -> ClassPriors:
    """Put the used pictures together.

    Args:
        pictures: latents by number.
        used: hashes by number of those that training gets.
        store: what keeps them.
        family: of the base that made them.

    Raises:
        SubjectBoothError: none is left.
    """
    if not used:
        raise SubjectBoothError(
            "every class image is excluded",
            "at least one",
            "take some hashes out of exclude, or raise count",
            "exclude",
        )
    hashes = tuple(used.values())
    with torch.inference_mode(False):  # in ComfyUI's inference mode they could not be trained on
        latents = torch.stack([pictures[index].clone() for index in used])
    prompt = store.recipe.prompt
    digest = sha256_of(f"class priors {FORMAT_VERSION}", prompt, *hashes)
    return ClassPriors(latents, prompt, hashes, digest, store.path.name, family, store.recipe.base_digest)
