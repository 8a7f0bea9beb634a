"""Tensors that lie in safetensors files and are read one at a time, when they are asked for.

A checkpoint of SDXL is 7 GB: what it holds is known from the files' headers alone, and a model that is built from it
never shares the memory with a second copy of its weights. A file is open only while a tensor is read: held open, its
pages would stay in memory beside the model, and on Windows nobody could replace it for as long as a run takes.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from .errors import SubjectBoothError


@dataclass(frozen=True)
class _Entry:
    path: Path
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
        with _opened(entry.path) as file:
            return file.get_tensor(entry.name)

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
    with _opened(path), path.open("rb") as file:
        header = json.loads(file.read(int.from_bytes(file.read(8), "little")))
        return {name: _Entry(path, name, torch.Size(about["shape"]), about["dtype"])
                for name, about in header.items() if name != "__metadata__"}


@contextmanager
def _opened(path: Path) -> Iterator[Any]:
    """The file, checked to be as long as its header says.

    Raises:
        SubjectBoothError: it cannot be opened or read, now or in the body.
    """
    from safetensors import safe_open

    try:
        # Python's own open says why a file cannot be opened; safetensors says it is not there.
        with path.open("rb"), safe_open(path, framework="pt") as file:
            yield file
    except FileNotFoundError:
        raise SubjectBoothError("a checkpoint that is not there", "a file or folder", "check the path",
                                str(path)) from None
    except OSError as error:
        raise SubjectBoothError(f"a checkpoint that cannot be opened ({error.strerror or type(error).__name__})",
                                "a file that may be read", "check its permissions", str(path)) from error
    except Exception as error:  # whatever a damaged file does to its reader
        raise SubjectBoothError(f"a checkpoint that cannot be read ({type(error).__name__})",
                                "a whole .safetensors file", "get the file again", str(path)) from error
