"""Expand the demo base's compact weights to a checkpoint in SD 1.5's layout, once, with a checksum.

Used by the `LoadDemoBase` node, so it only imports torch and safetensors.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import logging
import os
import tempfile
from pathlib import Path
from typing import IO

import torch
from safetensors.torch import load_file

from .expand import wide_tensors

logger = logging.getLogger("subjectbooth")

WEIGHTS = Path(__file__).parent / "weights" / "demo_base.safetensors"
MANIFEST = Path(__file__).parent / "weights" / "manifest.json"
NAME = "subjectbooth_demo_base.safetensors"
_DTYPES = {torch.float16: "F16", torch.float32: "F32"}
_checked: dict[Path, tuple[int, int, str]] = {}


def read_packed(path: Path = WEIGHTS) -> dict[str, torch.Tensor]:
    """The compact weights as stored (fp16, divided)."""
    return load_file(path)


def manifest() -> dict[str, str]:
    """The SHA-256 of the compact weights and of the expanded checkpoint."""
    recorded: dict[str, str] = json.loads(MANIFEST.read_text(encoding="utf-8"))
    return recorded


def sha256_of(path: Path) -> str:
    """Hex SHA-256 of a file."""
    with path.open("rb") as handle:
        digest = hashlib.sha256()
        while chunk := handle.read(1 << 22):
            digest.update(chunk)
    return digest.hexdigest()


def write_checkpoint(packed: dict[str, torch.Tensor], handle: IO[bytes]) -> str:
    """Write the wide checkpoint as safetensors and return its SHA-256. Deterministic on all machines."""
    header: dict[str, object] = {"__metadata__": {"format": "pt"}}
    at = 0
    for name, value in wide_tensors(packed):
        size = value.numel() * value.element_size()
        header[name] = {
            "dtype": _DTYPES[value.dtype],
            "shape": list(value.shape),
            "data_offsets": [at, at + size],
        }
        at += size
    text = json.dumps(header, separators=(",", ":")).encode("utf-8")
    text += b" " * (-len(text) % 8)
    digest = hashlib.sha256()
    for chunk in (len(text).to_bytes(8, "little"), text):
        digest.update(chunk)
        handle.write(chunk)
    for _, value in wide_tensors(packed):
        # safetensors is little-endian, like every machine that runs ComfyUI.
        chunk = value.contiguous().numpy().tobytes()
        digest.update(chunk)
        handle.write(chunk)
    return digest.hexdigest()


def _has_checksum(path: Path, expected: str) -> bool:
    """Whether the file has the expected SHA-256. Cached as long as its size and modification time stay the same."""
    if not path.is_file():
        return False
    stat = path.stat()
    seen = (stat.st_size, stat.st_mtime_ns, expected)
    if _checked.get(path) != seen:
        if sha256_of(path) != expected:
            return False
        _checked[path] = seen
    return True


def ensure_checkpoint(folder: Path) -> Path:
    """The path of the demo base's checkpoint in *folder*; it is written if it is missing or corrupt.

    Takes a few seconds and about 460 MB the first time. The file is written atomically.

    Raises:
        OSError: the folder is not writable.
        ValueError: the shipped weights are corrupt.
    """
    expected = manifest()
    path = folder / NAME
    if _has_checksum(path, expected["checkpoint"]):
        return path
    if path.exists():
        logger.warning("%s is corrupt or from another version; writing it again", path.name)
    if sha256_of(WEIGHTS) != expected["weights"]:
        raise ValueError(
            f"The demo base's weights are damaged: the checksum of {WEIGHTS.name} is wrong. "
            "It must be the file that ships with the pack. Reinstall the pack, or restore the file with git checkout."
        )
    folder.mkdir(parents=True, exist_ok=True)
    handle, part = tempfile.mkstemp(prefix=f".{NAME}.", suffix=".part", dir=folder)
    try:
        with os.fdopen(handle, "wb") as stream:
            written = write_checkpoint(read_packed(), stream)
            stream.flush()
            os.fsync(stream.fileno())
        if written != expected["checkpoint"]:
            raise ValueError(
                f"The demo base's checkpoint has SHA-256 {written[:12]}, expected {expected['checkpoint'][:12]}. "
                "The pack's files must all be of the same version. Reinstall the pack."
            )
        Path(part).chmod(0o644)
        os.replace(part, path)
    except BaseException:
        with contextlib.suppress(OSError):
            Path(part).unlink()
        raise
    logger.info("wrote the demo base to %s", path)
    return path
