"""Putting a finished adapter where LoRA loaders look, without ever overwriting somebody else's file."""

from __future__ import annotations

import re
from pathlib import Path, PurePosixPath, PureWindowsPath

import torch

from .errors import SubjectBoothError
from .metadata import named
from .safefile import read_metadata, to_bytes
from .storage import disk_errors, remove_parts, write_atomic

# Characters that Windows refuses in file names; a workflow made on Linux should run there too.
_FORBIDDEN = re.compile(r'[<>:"|?*\x00-\x1f]')
_RESERVED = re.compile(r"(?i)^(con|prn|aux|nul|conin\$|conout\$|com[\d¹²³]|lpt[\d¹²³])(\s*\..*)?$")
SUFFIX = ".safetensors"
MAX_NAME_BYTES = 200
"""Of one file name: file systems take 255 bytes (an emoji is 4), and ``_2.safetensors`` has to fit behind it."""


def checked_name(output_name: str) -> PurePosixPath:
    """The output name as a relative path without the suffix; sub-folders are allowed ("pets/rex").

    Raises:
        SubjectBoothError: it is empty, absolute, leaves the folder, or cannot be a file name on some system.
    """
    text = output_name.strip().replace("\\", "/").removesuffix(SUFFIX)
    parts = PurePosixPath(text).parts
    problem = ""
    if any(0xD800 <= ord(character) < 0xE000 for character in text):
        problem = "has a broken character in it"
    elif not parts or text.endswith("/"):
        problem = "is empty"
    elif text.startswith("/") or PureWindowsPath(text).drive or ".." in parts:
        problem = "leaves the LoRA folder"
    elif any(_FORBIDDEN.search(part) or _RESERVED.match(part) or part != part.strip(" .") for part in parts):
        problem = "has characters or words that Windows does not allow in file names"
    elif len(text) > 200 or any(len(part.encode("utf-8")) > MAX_NAME_BYTES for part in parts):
        problem = f"is longer than {MAX_NAME_BYTES} bytes"
    if problem:
        shown = output_name if len(output_name) <= 80 else f"{output_name[:77]}..."
        raise SubjectBoothError(f"output_name {shown!r}, which {problem}",
                                "a file name, perhaps in a sub-folder", "use a name such as rex or pets/rex",
                                "output_name")
    return PurePosixPath(*parts)


def publish(lora: Path, folder: Path, output_name: str) -> Path:
    """Copy an adapter from its run's folder to ``<folder>/<output_name>.safetensors``, under its name in the metadata.

    A file of the same run is replaced; when the name is taken by anything else, ``_2``, ``_3`` ... is added.

    Args:
        lora: the adapter in its run's folder.
        folder: ComfyUI's LoRA folder, or any other.
        output_name: see :func:`checked_name`.

    Returns:
        Where it lies now.

    Raises:
        SubjectBoothError: the name cannot be used, or the folder cannot be written.
    """
    name = checked_name(output_name)
    metadata = read_metadata(lora)
    with disk_errors("the LoRA cannot be written", (folder / name).parent):
        target = _free_name(folder, name, metadata["subjectbooth.run_key"])
    relative = target.relative_to(folder).with_suffix("").as_posix()
    content = to_bytes(_tensors(lora), named(metadata, relative.rsplit("/", 1)[-1]))
    with disk_errors("the LoRA cannot be written", target.parent):
        if not (target.is_file() and target.read_bytes() == content):
            write_atomic(target, content)
        remove_parts(target.parent, older_than=3600)
    return target


def _free_name(folder: Path, name: PurePosixPath, run_key: str) -> Path:
    number = 1
    while True:
        tail = "" if number == 1 else f"_{number}"
        target = folder / name.parent / f"{name.name}{tail}{SUFFIX}"
        if not target.exists() or _run_key_of(target) == run_key:
            return target
        number += 1


def _run_key_of(path: Path) -> str | None:
    try:
        return read_metadata(path).get("subjectbooth.run_key")
    except (SubjectBoothError, OSError):
        return None


def _tensors(path: Path) -> dict[str, torch.Tensor]:
    import safetensors.torch

    return safetensors.torch.load_file(path)
