"""Tensors that lie in safetensors files and are read one at a time, when they are asked for.

A checkpoint of SDXL is 7 GB: what it holds is known from the files' headers alone, and a model that is built from it
never shares the memory with a second copy of its weights. A file is open only while a tensor is read: held open, its
pages would stay in memory beside the model, and on Windows nobody could replace it for as long as a run takes. The
safetensors library checks a file when it is first opened. It would do so again at each opening, 3 ms in a file of
SDXL's size, so the tensors' bytes are read from where the header says.
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
    """Where a tensor lies: from byte ``begin`` to ``end`` of a file that had this size and time of change."""

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
            SubjectBoothError: a file cannot be read, is cut short or is no safetensors file.
        """
        entries: dict[str, _Entry] = {}
        for path in paths:
            entries |= _entries_of(path)
        return cls(entries)

    def __getitem__(self, name: str) -> torch.Tensor:
        """One tensor, read anew each time.

        Raises:
            SubjectBoothError: the file cannot be read or is another one now, or the tensor is of a type that torch
                does not have.
        """
        entry = self._entries[name]
        if entry.dtype not in _DTYPES:
            raise SubjectBoothError(
                f"a tensor stored as {entry.dtype}",
                "weights in fp32, fp16 or bf16",
                "use another checkpoint",
                f"{entry.path}, {name}",
            )
        # Outside the block below: too little memory is not the file's fault. The device is named, as another pack may
        # have set another default.
        data = torch.empty(entry.end - entry.begin, dtype=torch.uint8, device="cpu")
        with _sentences(entry.path), entry.path.open("rb") as file:
            file.seek(entry.begin)
            if _stamp(file) != entry.stamp or file.readinto(data.numpy().data) != len(data):
                raise SubjectBoothError(
                    "a checkpoint that was changed while it was read",
                    "the file as it was",
                    "start again when it is whole",
                    str(entry.path),
                )
        return data.view(_DTYPES[entry.dtype]).reshape(entry.shape)

    def __iter__(self) -> Iterator[str]:
        return iter(self._entries)

    def __len__(self) -> int:
        return len(self._entries)

    def __contains__(self, name: object) -> bool:
        return name in self._entries  # Mapping's own way would read the tensor

    @property
    def shapes(self) -> dict[str, torch.Size]:
        """Shape of every tensor."""
        return {name: entry.shape for name, entry in self._entries.items()}

    @property
    def dtypes(self) -> dict[str, str]:
        """What every tensor is stored as, by safetensors' names (F32, F16, BF16, F8_E4M3, U8 ...)."""
        return {name: entry.dtype for name, entry in self._entries.items()}

    def below(self, prefix: str) -> StoredTensors:
        """Those whose names start with ``prefix``, which is taken off."""
        return StoredTensors(
            {name.removeprefix(prefix): entry for name, entry in self._entries.items() if name.startswith(prefix)}
        )

    def renamed(self, rename: Callable[[str], str]) -> StoredTensors:
        """The same tensors under other names."""
        return StoredTensors({rename(name): entry for name, entry in self._entries.items()})


def _entries_of(path: Path) -> dict[str, _Entry]:
    from safetensors import safe_open

    # Python's own open says why a file cannot be opened; safetensors says it is not there.
    with _sentences(path), path.open("rb") as file, safe_open(path, framework="pt"):
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
def _sentences(path: Path) -> Iterator[None]:
    """What may go wrong with a file that is read inside.

    Raises:
        SubjectBoothError: for any error.
    """
    try:
        yield
    except SubjectBoothError:
        raise
    except FileNotFoundError:
        raise SubjectBoothError(
            "a checkpoint that is not there", "a file or folder", "check the path", str(path)
        ) from None
    except OSError as error:
        raise SubjectBoothError(
            f"a checkpoint that cannot be opened ({error.strerror or type(error).__name__})",
            "a file that may be read",
            "check its permissions",
            str(path),
        ) from error
    except Exception as error:  # whatever a damaged file does to its reader
        raise SubjectBoothError(
            f"a checkpoint that cannot be read ({type(error).__name__})",
            "a whole .safetensors file",
            "get the file again",
            str(path),
        ) from error
