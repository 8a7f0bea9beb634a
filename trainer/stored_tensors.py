"""Tensors that lie in safetensors files and are read one at a time, when they are asked for.

A checkpoint of SDXL is 7 GB: what it holds is known from the files' headers alone, and a model that is built from it
never shares the memory with a second copy of its weights.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from .errors import SubjectBoothError

HEADER_LIMIT = 100_000_000
"""Bytes; the format's own limit."""


@dataclass(frozen=True)
class _Entry:
    file: Any
    name: str
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
        entry = self._entries[name]
        return entry.file.get_tensor(entry.name)

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
        return StoredTensors({name.removeprefix(prefix): entry for name, entry in self._entries.items()
                              if name.startswith(prefix)})

    def renamed(self, rename: Callable[[str], str]) -> StoredTensors:
        """The same tensors under other names."""
        return StoredTensors({rename(name): entry for name, entry in self._entries.items()})


def _entries_of(path: Path) -> dict[str, _Entry]:
    from safetensors import safe_open

    try:
        with path.open("rb") as file:
            length = int.from_bytes(file.read(8), "little")
            if not 2 <= length <= HEADER_LIMIT:
                raise ValueError(f"a header of {length} bytes")
            header = json.loads(file.read(length))
        opened = safe_open(path, framework="pt")  # checks that the file is as long as its header says
        return {name: _Entry(opened, name, torch.Size(about["shape"]), about["dtype"])
                for name, about in header.items() if name != "__metadata__"}
    except FileNotFoundError:
        raise SubjectBoothError("a checkpoint that is not there", "a file or folder", "check the path",
                                str(path)) from None
    except OSError as error:
        raise SubjectBoothError(f"a checkpoint that cannot be opened ({error.strerror or type(error).__name__})",
                                "a file that may be read", "check its permissions", str(path)) from error
    except Exception as error:  # whatever a damaged file does to its reader
        raise SubjectBoothError(f"a checkpoint that cannot be read ({type(error).__name__})",
                                "a whole .safetensors file", "get the file again", str(path)) from error
