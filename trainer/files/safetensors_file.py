"""Safetensors files that are the same bytes for the same content, and that know when they were damaged."""

from __future__ import annotations

import hashlib
import json
from pathlib import Path

import torch

from ..errors import SubjectBoothError
from .storage import canonical_json, write_atomic

CHECKSUM = "subjectbooth.sha256"
NOT_CHECKSUMMED = (CHECKSUM, "ss_output_name", "modelspec.title")
"""Metadata that a checksum leaves out: itself, and the name under which a LoRA is published."""


def to_bytes(tensors: dict[str, torch.Tensor], metadata: dict[str, str]) -> bytes:
    """A safetensors file with its metadata in sorted order: the library writes it in a random one."""
    import safetensors.torch

    plain = safetensors.torch.save({name: tensor.contiguous() for name, tensor in tensors.items()})
    header, body = _split(plain)
    sorted_metadata = {name: metadata[name] for name in sorted(metadata)}
    text = json.dumps({"__metadata__": sorted_metadata, **header}, separators=(",", ":"), ensure_ascii=False)
    encoded = text.encode("utf-8")
    encoded += b" " * (-len(encoded) % 8)  # the format wants the tensors aligned to 8 bytes
    return len(encoded).to_bytes(8, "little") + encoded + body


def body_hash(tensors: dict[str, torch.Tensor]) -> str:
    """SHA-256 of the file's tensor bytes, which other tools know as ``sshs_model_hash``."""
    return hashlib.sha256(_split(to_bytes(tensors, {}))[1]).hexdigest()


def to_bytes_with_checksum(tensors: dict[str, torch.Tensor], metadata: dict[str, str]) -> bytes:
    """Like :func:`to_bytes`, with a checksum in the metadata over everything else, so that damage can be told."""
    return to_bytes(tensors, {**metadata, CHECKSUM: _checksum(to_bytes(tensors, metadata))})


def checksum_matches(content: bytes) -> bool:
    """Whether the content matches its own checksum; see :func:`to_bytes_with_checksum`.

    Raises:
        Exception: of any kind, for content that is damaged so far that it cannot be taken apart.
    """
    return bool(_split(content)[0]["__metadata__"][CHECKSUM] == _checksum(content))


def write_checked(path: Path, tensors: dict[str, torch.Tensor], state: object) -> None:
    """Write tensors and a JSON value in one atomic file that :func:`read_checked` can tell is whole."""
    write_atomic(path, to_bytes_with_checksum(tensors, {"state": canonical_json(state)}))


def read_checked(path: Path) -> tuple[dict[str, torch.Tensor], object]:
    """Read what :func:`write_checked` wrote.

    Raises:
        SubjectBoothError: the file is truncated, damaged or not one of ours.
        OSError: it cannot be read now, which says nothing about what is in it.
    """
    import safetensors.torch

    damaged = SubjectBoothError(
        "a damaged file", "a file as it was written (its checksum differs)", "delete it; it is made anew", str(path)
    )
    content = path.read_bytes()
    try:
        if not checksum_matches(content):
            raise damaged
        return safetensors.torch.load(content), json.loads(_split(content)[0]["__metadata__"]["state"])
    except MemoryError:
        raise
    except Exception as error:  # a bit flip can break the header in any way at all
        raise damaged from error


def read_metadata(path: Path, limit: int = 4 << 20) -> dict[str, str]:
    """The metadata of any safetensors file, without reading its tensors.

    Args:
        path: the file, possibly a stranger's.
        limit: bytes; a longer header is refused before it is read.

    Raises:
        SubjectBoothError: it is no safetensors file, or its header is larger than ``limit``.
    """
    with path.open("rb") as file:
        length = int.from_bytes(file.read(8), "little")
        size = path.stat().st_size
        if not 2 <= length <= min(limit, size - 8):
            raise SubjectBoothError(
                f"a header of {length} bytes in a file of {size}",
                "a whole safetensors file",
                "get the file again",
                path.name,
            )
        text = file.read(length)
    try:
        header = json.loads(text)
        metadata = header.get("__metadata__") or {}
        return {str(name): str(value) for name, value in metadata.items()}
    except (ValueError, AttributeError, RecursionError) as error:  # the last: brackets, thousands deep
        raise SubjectBoothError(
            "a header that is not JSON", "a whole safetensors file", "get the file again", path.name
        ) from error


def _split(content: bytes) -> tuple[dict[str, dict[str, str]], bytes]:
    length = int.from_bytes(content[:8], "little")
    return json.loads(content[8 : 8 + length]), content[8 + length :]


def _checksum(content: bytes) -> str:
    # Over the header as well: in it stand the tensors' names, and a flipped bit there is damage too.
    header, body = _split(content)
    metadata = {name: value for name, value in header["__metadata__"].items() if name not in NOT_CHECKSUMMED}
    text = canonical_json({**header, "__metadata__": metadata})
    return hashlib.sha256(text.encode("utf-8") + b";" + body).hexdigest()
