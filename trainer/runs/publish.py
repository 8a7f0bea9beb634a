"""Publishes a finished adapter to a LoRA folder without overwriting other LoRAs."""

from __future__ import annotations

import re
import tempfile
from collections.abc import Iterator
from dataclasses import dataclass
from itertools import count
from pathlib import Path, PurePosixPath, PureWindowsPath

from ..errors import SubjectBoothError
from ..files.safetensors_file import Serialized, checksum_matches, read_metadata
from ..files.storage import TEMP_PREFIX, disk_errors, make_folder, remove_temp_files, write_atomic
from .metadata import with_output_name

# Characters that Windows does not allow in file names: a workflow from Linux should also run on Windows.
_FORBIDDEN = re.compile(r'[<>:"|?*\x00-\x1f]')
_RESERVED = re.compile(r"(?i)^(con|prn|aux|nul|conin\$|conout\$|com[\d¹²³]|lpt[\d¹²³])(\s*\..*)?$")
SUFFIX = ".safetensors"
MAX_NAME_BYTES = 200
"""Maximum length of a file name: file systems allow 255 bytes, and ``_2.safetensors`` is appended."""


def checked_name(output_name: str) -> PurePosixPath:
    """Validate the output name and return it as a relative path without suffix. Subfolders are allowed ("pets/rex").

    Raises:
        SubjectBoothError: the name is empty, absolute, outside the LoRA folder, or invalid as a file name on some
            system.
    """
    text = output_name.strip().replace("\\", "/").removesuffix(SUFFIX)
    parts = PurePosixPath(text).parts
    problem = ""
    if any(0xD800 <= ord(character) < 0xE000 for character in text):
        problem = "contains an invalid character"
    elif not parts or text.endswith("/"):
        problem = "is empty"
    elif (
        text.startswith("/")
        or PureWindowsPath(text).drive
        or ".." in parts
        or (len(parts) > 1 and parts[0].startswith("~"))
    ):  # the home folder
        problem = "leaves the LoRA folder"
    elif any(_FORBIDDEN.search(part) or _RESERVED.match(part) or part != part.strip(" .") for part in parts):
        problem = "contains characters or words that Windows does not allow in file names"
    elif len(text) > 200 or any(len(part.encode("utf-8")) > MAX_NAME_BYTES for part in parts):
        problem = f"is longer than {MAX_NAME_BYTES} bytes"
    if problem:
        shown = output_name if len(output_name) <= 80 else f"{output_name[:77]}..."
        raise SubjectBoothError(
            f"output_name {shown!r} {problem}",
            "a file name, optionally with a subfolder",
            "use a name such as rex or pets/rex",
            "output_name",
        )
    return PurePosixPath(*parts)


@dataclass(frozen=True)
class Published:
    """A published LoRA.

    Attributes:
        path: path of the file.
        note: a sentence for the user if the name was taken, otherwise empty.
    """

    path: Path
    note: str = ""


def check_folder(folder: Path, output_name: str) -> None:
    """Check before a run that its adapter can be published, by writing and deleting a temporary file.

    Raises:
        SubjectBoothError: the name is invalid, or the folder is not writable.
    """
    parent = (folder / checked_name(output_name)).parent
    with disk_errors("the LoRA cannot be written", parent):
        make_folder(parent)
        with tempfile.TemporaryFile(dir=parent, prefix=TEMP_PREFIX):
            pass


def publish(lora: Path, folder: Path, output_name: str) -> Published:
    """Copy an adapter to ``<folder>/<output_name>.safetensors``, and add the name to its metadata.

    An earlier file of the same run is replaced, unless it was edited. If the name is taken by another or an edited
    file, ``_2``, ``_3`` ... is appended.

    Args:
        lora: the adapter in its run's folder.
        folder: ComfyUI's LoRA folder, or another one.
        output_name: see :func:`checked_name`.

    Raises:
        SubjectBoothError: the name is invalid, or the folder is not writable.
    """
    name = checked_name(output_name)
    metadata, tensors = read_metadata(lora), Serialized(lora.read_bytes())
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
    content = tensors.parts(with_output_name(metadata, target.stem))
    with disk_errors("the LoRA cannot be written", target.parent):
        if not (target.is_file() and target.read_bytes() == b"".join(content)):
            write_atomic(target, content)
        remove_temp_files(target.parent, older_than=3600)
    if edited:
        note = f"{', '.join(edited)} was edited after it was published and is kept: this LoRA is saved as {target.name}"
    elif target.stem != name.name:
        note = f"{name.name}{SUFFIX} is another LoRA and is kept: this one is saved as {target.name}"
    else:
        note = ""
    return Published(target, note)


def _candidate_paths(folder: Path, name: PurePosixPath) -> Iterator[Path]:
    for number in count(1):
        tail = "" if number == 1 else f"_{number}"
        yield folder / name.parent / f"{name.name}{tail}{SUFFIX}"


def _is_as_published(path: Path) -> bool:
    """Whether the file is unchanged since :func:`publish` wrote it under this name.

    The checksum covers everything except the name in the metadata, which is added after the checksum.
    """
    try:
        metadata = read_metadata(path)
        return with_output_name(metadata, path.stem) == metadata and checksum_matches(path.read_bytes())
    except Exception:  # an edited file can raise anything
        return False


def _run_key_of(path: Path) -> str | None:
    try:
        return read_metadata(path).get("subjectbooth.run_key")
    except (SubjectBoothError, OSError):
        return None
