"""The one kind of error a user is meant to read, and the check for packages that may be missing."""

from __future__ import annotations

import importlib
import importlib.metadata
from types import ModuleType


class SubjectBoothError(Exception):
    """Something the user gave cannot be used, and here is what to do about it.

    Reads *what was given -> what is needed -> what to do -> where*, so that the sentence alone is enough and
    nobody has to read a traceback.

    Args:
        given: what was found, with the value itself (``"resolution 500"``).
        needed: what would have been right (``"a multiple of 8"``).
        todo: the next step for the user (``"set resolution to 504"``).
        where: the file, node or input that it is about; empty when the sentence already says so.
    """

    def __init__(self, given: str, needed: str, todo: str, where: str = "") -> None:
        self.given, self.needed, self.todo, self.where = given, needed, todo, where
        sentence = f"{given}; needed: {needed}. {todo[:1].upper()}{todo[1:]}."
        super().__init__(f"{sentence} ({where})" if where else sentence)


# Lower bounds are those of requirements.txt; a test holds the two together.
MINIMUM_VERSIONS: dict[str, str] = {
    "diffusers": "0.31.0",
    "peft": "0.13.0",
    "accelerate": "1.0.0",
    "transformers": "4.50.3",
    "safetensors": "0.4.3",
    "filelock": "3.12.0",
}

TORCH_MINIMUM = "2.4"
"""ComfyUI brings torch, so requirements.txt does not name it."""


def require(*packages: str) -> list[ModuleType]:
    """Import ``packages``, or say in one sentence what to install.

    Called at the start of a run instead of at import, so that a missing package never keeps the nodes from loading.

    Raises:
        SubjectBoothError: a package is missing, older than :data:`MINIMUM_VERSIONS`, or fails to import.
    """
    return [_require_one(name) for name in packages]


def _require_one(name: str) -> ModuleType:
    minimum = TORCH_MINIMUM if name == "torch" else MINIMUM_VERSIONS.get(name, "0")
    install = (
        "install the pack's requirements into ComfyUI's own Python: "
        f'python -m pip install "{name}>={minimum}", then restart ComfyUI'
    )
    if name == "torch":
        install = "update ComfyUI, which brings torch (a newer portable version, or its requirements.txt)"
    try:
        found = importlib.metadata.version(name)
    except importlib.metadata.PackageNotFoundError:
        raise SubjectBoothError(
            f"the Python package {name} is not installed", f"{name} {minimum} or newer", install
        ) from None
    if _release(found) < _release(minimum):
        raise SubjectBoothError(f"{name} {found} is installed", f"{name} {minimum} or newer", install)
    try:
        return importlib.import_module(name)
    except Exception as error:  # a broken install raises anything: ImportError, OSError, RuntimeError
        raise SubjectBoothError(
            f"{name} {found} is installed but fails to import ({type(error).__name__}: {error})",
            f"a working {name}",
            f'reinstall it: python -m pip install --force-reinstall "{name}>={minimum}"',
        ) from error


def _release(version: str) -> tuple[int, ...]:
    """``"0.31.0.dev1"`` -> ``(0, 31, 0)``: enough to compare with a lower bound, with no extra package."""
    numbers = []
    for part in version.split("."):
        digits = ""
        for character in part:
            if not character.isdigit():
                break
            digits += character
        if not digits:
            break
        numbers.append(int(digits))
    return tuple(numbers)
