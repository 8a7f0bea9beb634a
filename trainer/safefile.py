"""Safetensors files that are the same bytes for the same content, and that know when they were damaged."""

from __future__ import annotations

import hashlib
import json
from pathlib import Path

import torch

from .errors import SubjectBoothError
from .storage import canonical_json, write_atomic

CHECKSUM = "subjectbooth.sha256"


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


def write_checked(path: Path, tensors: dict[str, torch.Tensor], state: object) -> None:
    """Write tensors and a JSON value in one atomic file that :func:`read_checked` can tell is whole."""
    text = canonical_json(state)
    checksum = hashlib.sha256((body_hash(tensors) + text).encode()).hexdigest()
    write_atomic(path, to_bytes(tensors, {CHECKSUM: checksum, "state": text}))


def read_checked(path: Path) -> tuple[dict[str, torch.Tensor], object]:
    """Read what :func:`write_checked` wrote.

    Raises:
        SubjectBoothError: the file is truncated, damaged or not one of ours.
    """
    import safetensors.torch

    damaged = SubjectBoothError("a damaged file", "a file as it was written (its checksum differs)",
                                "delete it; it is made anew", str(path))
    try:
        content = path.read_bytes()
        header, body = _split(content)
        metadata = header["__metadata__"]
        tensors = safetensors.torch.load(content)
        expected = hashlib.sha256((hashlib.sha256(body).hexdigest() + metadata["state"]).encode()).hexdigest()
        if metadata[CHECKSUM] != expected:
            raise damaged
        return tensors, json.loads(metadata["state"])
    except FileNotFoundError:
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
            raise SubjectBoothError(f"a header of {length} bytes in a file of {size}", "a whole safetensors file",
                                    "get the file again", path.name)
        text = file.read(length)
    try:
        header = json.loads(text)
        metadata = header.get("__metadata__") or {}
        return {str(name): str(value) for name, value in metadata.items()}
    except (ValueError, AttributeError) as error:
        raise SubjectBoothError("a header that is not JSON", "a whole safetensors file", "get the file again",
                                path.name) from error


def _split(content: bytes) -> tuple[dict[str, dict[str, str]], bytes]:
    length = int.from_bytes(content[:8], "little")
    return json.loads(content[8:8 + length]), content[8 + length:]
