"""The error that users are meant to read, and the check for missing or outdated packages."""

from __future__ import annotations

import importlib
import importlib.metadata
import re
from collections.abc import Iterable
from types import ModuleType

from .topics import Terms, Topic, ended


class SubjectBoothError(Exception):
    """Something the user gave cannot be used; the message says what to do about it.

    The message is a few short sentences: what is wrong, what is required, what to do, where. For example
    ``resolution 500. Required: a multiple of 8. Use 496.`` A name that the sentences already mention is not repeated.

    Args:
        given: what is wrong, with the value itself (``"resolution 500"``, ``"no photos were given"``).
        needed: what is accepted (``"a multiple of 8"``).
        todo: what to do next, as an imperative (``"use 496"``).
        where: the file or setting concerned; empty for the topic's own word, or if the sentences already say it.
        about: what a front end may know more about; see :meth:`in_terms`.
    """

    def __init__(self, given: str, needed: str, todo: str, where: str = "", about: Topic | None = None) -> None:
        if about is not None:
            where = where or about.value
        self.given, self.needed, self.todo, self.where, self.about = given, needed, todo, where, about
        super().__init__(_message(given, needed, todo, where))

    def in_terms(self, terms: Terms) -> SubjectBoothError:
        """The same error, with the advice of a front end and its own name for the place."""
        if self.about is None or self.about not in terms:
            return self
        term = terms[self.about]
        where = term.where if term.where and self.where == self.about.value else self.where
        todo = f"{ended(self.todo)} {term.advice}" if term.advice else self.todo
        return SubjectBoothError(self.given, self.needed, todo, where)


def check_choice(name: str, value: object, choices: Iterable[str]) -> None:
    """Check a setting that is one of a few words; any value is compared, also one that a list or a dictionary holds.

    Args:
        name: what the setting is called in messages.

    Raises:
        SubjectBoothError: it is none of them.
    """
    allowed = tuple(choices)
    if value not in allowed:
        shown = repr(value) if len(repr(value)) <= 60 else f"{repr(value)[:60]}…"
        needed = " or ".join(allowed) if len(allowed) == 2 else f"one of {', '.join(allowed)}"
        raise SubjectBoothError(f"{name} {shown}", needed, "choose one of them", name)


_PLAIN_WORD = re.compile(r"[a-z]+(?=[ ,;:'’-]|\.? |\.?$)")
"""The start of a text that may be capitalised: not an identifier, a file name or an option."""


def _message(given: str, needed: str, todo: str, where: str) -> str:
    text = f"{_sentence(given, where)} Required: {ended(needed)} {_sentence(todo, where)}"
    named = re.search(rf"(?<!\w){re.escape(where)}(?!\w)", text, re.IGNORECASE) is not None
    # No full stop after a path, so that it can be copied as it is.
    return text if not where or named else f"{text} Where: {where}"


def _sentence(text: str, where: str) -> str:
    first = _PLAIN_WORD.match(text)
    if first is not None and first.group() != where:  # a setting keeps its spelling
        text = text[0].upper() + text[1:]
    return ended(text)


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
"""Not in requirements.txt, because ComfyUI brings torch."""


def require(*packages: str) -> list[ModuleType]:
    """Import ``packages``, or raise an error that says what to install.

    Called at the start of a run, not at import, so that the nodes load even if a package is missing.

    Raises:
        SubjectBoothError: a package is missing, older than :data:`MINIMUM_VERSIONS`, or fails to import.
    """
    return [_require_one(name) for name in packages]


def _require_one(name: str) -> ModuleType:
    minimum = TORCH_MINIMUM if name == "torch" else MINIMUM_VERSIONS.get(name, "0")
    install, about = f'run python -m pip install "{name}>={minimum}"', Topic.PACKAGE
    if name == "torch":
        install, about = "install PyTorch for your device", Topic.TORCH
    try:
        found = importlib.metadata.version(name)
    except importlib.metadata.PackageNotFoundError:
        raise SubjectBoothError(
            f"the Python package {name} is not installed", f"{name} {minimum} or newer", install, name, about
        ) from None
    if _is_older(found, minimum):
        raise SubjectBoothError(
            f"{name} {found} is installed, which is too old", f"{name} {minimum} or newer", install, name, about
        )
    try:
        return importlib.import_module(name)
    except Exception as error:  # a broken install raises anything: ImportError, OSError, RuntimeError
        raise SubjectBoothError(
            f"{name} {found} is installed but fails to import ({type(error).__name__}: {error})",
            f"a working {name}",
            f'reinstall it: python -m pip install --force-reinstall "{name}>={minimum}"',
            name,
            about,
        ) from error


def _is_older(version: str, minimum: str) -> bool:
    """Compare releases; a pre-release (``0.31.0.dev1``) counts as its release, as it usually has the same API."""
    # Not in requirements.txt: transformers, accelerate and huggingface_hub (for diffusers) all depend on packaging.
    # Imported here, so that the nodes load and name the missing package even if none of these is installed.
    try:
        from packaging.version import InvalidVersion, Version
    except ImportError:
        return False
    try:
        return Version(Version(version).base_version) < Version(minimum)
    except InvalidVersion:  # somebody's own build; importing it will tell
        return False
