"""The demo base as a file: compact weights in, a full SD 1.5-layout checkpoint out, written once and checked.

Used by the `LoadDemoBase` node, so it imports nothing but torch and safetensors.
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
    """The compact weights as they are stored (fp16, divided)."""
    return load_file(path)


def manifest() -> dict[str, str]:
    """sha256 of the compact weights and of the checkpoint they make."""
    recorded: dict[str, str] = json.loads(MANIFEST.read_text(encoding="utf-8"))
    return recorded


def sha256_of(path: Path) -> str:
    """Hex digest of a file."""
    with path.open("rb") as handle:
        digest = hashlib.sha256()
        while chunk := handle.read(1 << 22):
            digest.update(chunk)
    return digest.hexdigest()


def write_checkpoint(packed: dict[str, torch.Tensor], handle: IO[bytes]) -> str:
    """Write the wide checkpoint as safetensors; returns its sha256. The same weights give the same bytes everywhere."""
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
        # safetensors is little-endian; so is every machine torch runs ComfyUI on.
        chunk = value.contiguous().numpy().tobytes()
        digest.update(chunk)
        handle.write(chunk)
    return digest.hexdigest()


def _is_whole(path: Path, expected: str) -> bool:
    """Whether the file has the expected digest. Remembered while its size and time of change stay the same."""
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
    """The demo base as a checkpoint file in *folder*: written if it is not there or not whole, else left alone.

    Takes a few seconds and about 460 MB the first time. Nothing half-written ever stands under the final name.

    Raises OSError when the folder cannot be written, and ValueError when the shipped weights are damaged.
    """
    expected = manifest()
    path = folder / NAME
    if _is_whole(path, expected["checkpoint"]):
        return path
    if path.exists():
        logger.warning("%s is damaged or of another version; writing it again", path.name)
    if sha256_of(WEIGHTS) != expected["weights"]:
        raise ValueError(
            f"The demo base's weights are damaged: {WEIGHTS.name} does not have its recorded checksum. "
            "It must be the file that ships with the pack. Get the pack again (git checkout, or install it anew)."
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
                f"The demo base's checkpoint has sha256 {written[:12]}, recorded is {expected['checkpoint'][:12]}. "
                "The pack's files must belong together. Install the pack anew."
            )
        Path(part).chmod(0o644)
        os.replace(part, path)
    except BaseException:
        with contextlib.suppress(OSError):
            Path(part).unlink()
        raise
    logger.info("wrote the demo base to %s", path)
    return path
