"""Deterministic safetensors files with a checksum: equal content gives equal bytes, and corruption is detected."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from pathlib import Path

import torch

from ..errors import SubjectBoothError
from .storage import canonical_json, write_atomic

CHECKSUM = "subjectbooth.sha256"
NOT_CHECKSUMMED = (CHECKSUM, "ss_output_name", "modelspec.title")
"""Metadata the checksum does not cover: itself, and the name under which a LoRA is published."""


class Serialized:
    """Tensors as the safetensors library writes them, once; metadata are added without serialising them again.

    Args:
        content: a safetensors file. Its metadata are ignored.
    """

    def __init__(self, content: bytes) -> None:
        header, self._body = _split(content)
        self._header = {name: about for name, about in header.items() if name != "__metadata__"}

    @classmethod
    def of(cls, tensors: Mapping[str, torch.Tensor]) -> Serialized:
        """Serialise tensors."""
        import safetensors.torch

        return cls(safetensors.torch.save({name: tensor.contiguous() for name, tensor in tensors.items()}))

    def body_hash(self) -> str:
        """SHA-256 of the tensor bytes: what other tools call ``sshs_model_hash``."""
        return hashlib.sha256(self._body).hexdigest()

    def parts(self, metadata: Mapping[str, str]) -> tuple[bytes, memoryview]:
        """Header and body of a file with these metadata, sorted; the safetensors library writes them in random order.
        The body is not copied."""
        sorted_metadata = {name: metadata[name] for name in sorted(metadata)}
        text = json.dumps({"__metadata__": sorted_metadata, **self._header}, separators=(",", ":"), ensure_ascii=False)
        encoded = text.encode("utf-8")
        encoded += b" " * (-len(encoded) % 8)  # the format requires 8-byte alignment of the tensors
        return len(encoded).to_bytes(8, "little") + encoded, self._body

    def parts_with_checksum(self, metadata: Mapping[str, str]) -> tuple[bytes, memoryview]:
        """Like :meth:`parts`, plus a checksum of everything else in the metadata."""
        checksum = _checksum({**self._header, "__metadata__": dict(metadata)}, self._body)
        return self.parts({**metadata, CHECKSUM: checksum})


def to_bytes(tensors: Mapping[str, torch.Tensor], metadata: Mapping[str, str]) -> bytes:
    """A whole file in memory, see :meth:`Serialized.parts`."""
    return b"".join(Serialized.of(tensors).parts(metadata))


def checksum_matches(content: bytes) -> bool:
    """Whether the content matches its own checksum; see :meth:`Serialized.parts_with_checksum`.

    Raises:
        Exception: of any type, if the content is too damaged to parse.
    """
    header, body = _split(content)
    return bool(header["__metadata__"][CHECKSUM] == _checksum(header, body))


def write_checked(path: Path, tensors: Mapping[str, torch.Tensor], state: object) -> None:
    """Write tensors and a JSON value atomically to one file, with a checksum that :func:`read_checked` verifies."""
    write_atomic(path, Serialized.of(tensors).parts_with_checksum({"state": canonical_json(state)}))


def read_checked(path: Path) -> tuple[dict[str, torch.Tensor], object]:
    """Read what :func:`write_checked` wrote.

    Raises:
        SubjectBoothError: the file is truncated, corrupt or not one of ours.
        OSError: reading failed; the file itself may be intact.
    """
    import safetensors.torch

    damaged = SubjectBoothError(
        "the file is corrupt", "content that matches its checksum", "delete it; it will be rebuilt", str(path)
    )
    content = path.read_bytes()
    try:
        if not checksum_matches(content):
            raise damaged
        return safetensors.torch.load(content), json.loads(_split(content)[0]["__metadata__"]["state"])
    except MemoryError:
        raise
    except Exception as error:  # a bit flip can break the header in any way
        raise damaged from error


def read_metadata(path: Path, limit: int = 4 << 20) -> dict[str, str]:
    """Read the metadata of any safetensors file, without its tensors.

    Args:
        path: the file; it may come from an untrusted source.
        limit: maximum size of the header in bytes; a longer one is rejected unread.

    Raises:
        SubjectBoothError: not a safetensors file, or its header is larger than ``limit``.
    """
    with path.open("rb") as file:
        length = int.from_bytes(file.read(8), "little")
        size = path.stat().st_size
        if not 2 <= length <= min(limit, size - 8):
            raise SubjectBoothError(
                f"the header claims {length} bytes in a file of {size} bytes",
                "an intact safetensors file",
                "download or copy the file again",
                path.name,
            )
        text = file.read(length)
    try:
        header = json.loads(text)
        metadata = header.get("__metadata__") or {}
        return {str(name): str(value) for name, value in metadata.items()}
    except (ValueError, AttributeError, RecursionError) as error:  # RecursionError: brackets nested thousands deep
        raise SubjectBoothError(
            "the header is not valid JSON", "an intact safetensors file", "download or copy the file again", path.name
        ) from error


def _split(content: bytes) -> tuple[dict[str, dict[str, str]], memoryview]:
    length = int.from_bytes(content[:8], "little")
    return json.loads(content[8 : 8 + length]), memoryview(content)[8 + length :]


def _checksum(header: Mapping[str, Mapping[str, str]], body: memoryview) -> str:
    # Covers the header too: a bit flip in a tensor's name is corruption as well.
    metadata = {name: value for name, value in header["__metadata__"].items() if name not in NOT_CHECKSUMMED}
    text = canonical_json({**header, "__metadata__": metadata})
    digest = hashlib.sha256(text.encode("utf-8") + b";")
    digest.update(body)
    return digest.hexdigest()
