"""Lazy access to tensors in safetensors files: each is read when it is needed.

An SDXL checkpoint is 7 GB. Its names and shapes are known from the header alone, and building a model from it never
holds a second copy of its weights. A file is open only while a tensor is read: otherwise its pages would stay in memory
next to the model, and on Windows nobody could replace the file during a run. The safetensors library validates the
header at each opening, 3 ms for a file of SDXL's size, so it opens a file once; tensors are then read directly, from
the offsets in the header.
"""

from __future__ import annotations

import json
import os
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import BinaryIO

import torch

from ...errors import SubjectBoothError

_DTYPES = {
    "F64": torch.float64,
    "F32": torch.float32,
    "F16": torch.float16,
    "BF16": torch.bfloat16,
    "F8_E4M3": torch.float8_e4m3fn,
    "F8_E5M2": torch.float8_e5m2,
    "I64": torch.int64,
    "I32": torch.int32,
    "I16": torch.int16,
    "I8": torch.int8,
    "U8": torch.uint8,
    "BOOL": torch.bool,
}


@dataclass(frozen=True)
class _Entry:
    """A tensor's place: bytes ``begin`` to ``end`` of a file of this size and modification time."""

    path: Path
    stamp: tuple[int, int]
    begin: int
    end: int
    shape: torch.Size
    dtype: str


class StoredTensors(Mapping[str, torch.Tensor]):
    """A read-only mapping from name to tensor. Iterating over names reads no tensor."""

    def __init__(self, entries: Mapping[str, _Entry]) -> None:
        self._entries = dict(entries)

    @classmethod
    def open(cls, paths: Sequence[Path]) -> StoredTensors:
        """All tensors of several files.

        Raises:
            SubjectBoothError: a file cannot be read, is truncated, or is not a safetensors file.
        """
        entries: dict[str, _Entry] = {}
        for path in paths:
            entries |= _entries_of(path)
        return cls(entries)

    def __getitem__(self, name: str) -> torch.Tensor:
        """One tensor, read from the file each time.

        Raises:
            SubjectBoothError: the file cannot be read or has changed, or torch does not have the tensor's type.
        """
        entry = self._entries[name]
        if entry.dtype not in _DTYPES:
            raise SubjectBoothError(
                f"a weight is stored as {entry.dtype}",
                "weights in fp32, fp16 or bf16",
                "use another checkpoint",
                f"{entry.path}, {name}",
            )
        # Outside the block below: running out of memory is not a problem of the file. The device is explicit, because
        # another pack may have changed the default.
        data = torch.empty(entry.end - entry.begin, dtype=torch.uint8, device="cpu")
        with _readable_errors(entry.path), entry.path.open("rb") as file:
            file.seek(entry.begin)
            if _stamp(file) != entry.stamp or file.readinto(data.numpy().data) != len(data):
                raise SubjectBoothError(
                    "the checkpoint changed while it was read",
                    "an unchanged file",
                    "start again when it is complete",
                    str(entry.path),
                )
        return data.view(_DTYPES[entry.dtype]).reshape(entry.shape)

    def __iter__(self) -> Iterator[str]:
        return iter(self._entries)

    def __len__(self) -> int:
        return len(self._entries)

    def __contains__(self, name: object) -> bool:
        return name in self._entries  # the default of Mapping would read the tensor

    @property
    def shapes(self) -> dict[str, torch.Size]:
        """Shapes by name."""
        return {name: entry.shape for name, entry in self._entries.items()}

    @property
    def dtypes(self) -> dict[str, str]:
        """Stored types by name, as safetensors calls them (F32, F16, BF16, F8_E4M3, U8 ...)."""
        return {name: entry.dtype for name, entry in self._entries.items()}

    def below(self, prefix: str) -> StoredTensors:
        """The tensors whose names start with ``prefix``, without it."""
        return StoredTensors(
            {name.removeprefix(prefix): entry for name, entry in self._entries.items() if name.startswith(prefix)}
        )

    def renamed(self, rename: Callable[[str], str]) -> StoredTensors:
        """The same tensors under other names."""
        return StoredTensors({rename(name): entry for name, entry in self._entries.items()})


def _entries_of(path: Path) -> dict[str, _Entry]:
    from safetensors import safe_open

    # Python's open reports why a file cannot be opened; safetensors only that it was not found.
    with _readable_errors(path), path.open("rb") as file, safe_open(path, framework="pt"):
        stamp = _stamp(file)
        length = int.from_bytes(file.read(8), "little")
        data = 8 + length
        return {
            name: _Entry(
                path,
                stamp,
                data + about["data_offsets"][0],
                data + about["data_offsets"][1],
                torch.Size(about["shape"]),
                about["dtype"],
            )
            for name, about in json.loads(file.read(length)).items()
            if name != "__metadata__"
        }


def _stamp(file: BinaryIO) -> tuple[int, int]:
    about = os.fstat(file.fileno())
    return about.st_size, about.st_mtime_ns


@contextmanager
def _readable_errors(path: Path) -> Iterator[None]:
    """Turn any error in reading the file into a message.

    Raises:
        SubjectBoothError: in place of any error.
    """
    try:
        yield
    except SubjectBoothError:
        raise
    except FileNotFoundError:
        raise SubjectBoothError(
            "the checkpoint was not found", "a file or folder", "check the path", str(path)
        ) from None
    except OSError as error:
        raise SubjectBoothError(
            f"the checkpoint cannot be opened ({error.strerror or type(error).__name__})",
            "a readable file",
            "check its permissions",
            str(path),
        ) from error
    except Exception as error:  # a damaged file may raise anything
        raise SubjectBoothError(
            f"the checkpoint cannot be read ({type(error).__name__})",
            "an intact .safetensors file",
            "get the file again",
            str(path),
        ) from error
