"""Putting a finished adapter where LoRA loaders look, without ever overwriting somebody else's file."""

from __future__ import annotations

import re
import tempfile
from collections.abc import Iterator
from dataclasses import dataclass
from itertools import count
from pathlib import Path, PurePosixPath, PureWindowsPath

import torch

from ..errors import SubjectBoothError
from ..files.safetensors_file import checksum_matches, read_metadata, to_bytes
from ..files.storage import TEMP_PREFIX, disk_errors, make_folder, remove_temp_files, write_atomic
from .metadata import with_output_name

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
    elif (
        text.startswith("/")
        or PureWindowsPath(text).drive
        or ".." in parts
        or (len(parts) > 1 and parts[0].startswith("~"))
    ):  # meant as the home folder
        problem = "leaves the LoRA folder"
    elif any(_FORBIDDEN.search(part) or _RESERVED.match(part) or part != part.strip(" .") for part in parts):
        problem = "has characters or words that Windows does not allow in file names"
    elif len(text) > 200 or any(len(part.encode("utf-8")) > MAX_NAME_BYTES for part in parts):
        problem = f"is longer than {MAX_NAME_BYTES} bytes"
    if problem:
        shown = output_name if len(output_name) <= 80 else f"{output_name[:77]}..."
        raise SubjectBoothError(
            f"output_name {shown!r}, which {problem}",
            "a file name, perhaps in a sub-folder",
            "use a name such as rex or pets/rex",
            "output_name",
        )
    return PurePosixPath(*parts)


@dataclass(frozen=True)
class Published:
    """Where an adapter was put.

    Attributes:
        path: the file.
        note: a sentence for the user; empty when there is nothing to tell.
    """

    path: Path
    note: str = ""


def check_folder(folder: Path, output_name: str) -> None:
    """Find before a run whether its adapter could be published, by writing a small file and removing it.

    Raises:
        SubjectBoothError: the name cannot be used, or the folder cannot be written.
    """
    parent = (folder / checked_name(output_name)).parent
    with disk_errors("the LoRA cannot be written", parent):
        make_folder(parent)
        with tempfile.TemporaryFile(dir=parent, prefix=TEMP_PREFIX):
            pass


def publish(lora: Path, folder: Path, output_name: str) -> Published:
    """Copy an adapter from its run's folder to ``<folder>/<output_name>.safetensors``, under its name in the metadata.

    An earlier file of the same run is replaced. When the name is taken by anything else, also by such a file that
    somebody has edited since, ``_2``, ``_3`` ... is added.

    Args:
        lora: the adapter in its run's folder.
        folder: ComfyUI's LoRA folder, or any other.
        output_name: see :func:`checked_name`.

    Raises:
        SubjectBoothError: the name cannot be used, or the folder cannot be written.
    """
    name = checked_name(output_name)
    metadata, tensors = read_metadata(lora), _read_tensors(lora)
    edited: list[str] = []
    with disk_errors("the LoRA cannot be written", (folder / name).parent):
        for target in _candidate_paths(folder, name):
            if not target.exists():
                break
            if _run_key_of(target) != metadata["subjectbooth.run_key"]:
                continue
            if _is_as_published(target):
                break
            edited.append(target.name)
    content = to_bytes(tensors, with_output_name(metadata, target.stem))
    with disk_errors("the LoRA cannot be written", target.parent):
        if not (target.is_file() and target.read_bytes() == content):
            write_atomic(target, content)
        remove_temp_files(target.parent, older_than=3600)
    if edited:
        note = f"{', '.join(edited)} was changed since it was published and is kept: this LoRA is {target.name}"
    elif target.stem != name.name:
        note = f"{name.name}{SUFFIX} is another LoRA and is kept: this one is {target.name}"
    else:
        note = ""
    return Published(target, note)


def _candidate_paths(folder: Path, name: PurePosixPath) -> Iterator[Path]:
    for number in count(1):
        tail = "" if number == 1 else f"_{number}"
        yield folder / name.parent / f"{name.name}{tail}{SUFFIX}"


def _is_as_published(path: Path) -> bool:
    """Whether nothing in the file was changed since :func:`publish` wrote it under this name.

    The file's own checksum tells for all but the name, which was given to it after the checksum was taken.
    """
    try:
        metadata = read_metadata(path)
        return with_output_name(metadata, path.stem) == metadata and checksum_matches(path.read_bytes())
    except Exception:  # whatever somebody else's program has made of it
        return False


def _run_key_of(path: Path) -> str | None:
    try:
        return read_metadata(path).get("subjectbooth.run_key")
    except (SubjectBoothError, OSError):
        return None


def _read_tensors(path: Path) -> dict[str, torch.Tensor]:
    import safetensors.torch

    return safetensors.torch.load_file(path)
