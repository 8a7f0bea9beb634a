"""Checks of names and values that somebody has typed: one sentence with the nearest right name."""

from __future__ import annotations

import difflib
from collections.abc import Collection, Mapping
from dataclasses import dataclass
from typing import Any

from ..errors import SubjectBoothError

_KINDS = {str: "text in quotes", int: "a whole number", float: "a number", bool: "true or false"}


@dataclass(frozen=True)
class Option:
    """A setting that a grid can vary.

    Attributes:
        kind: type of its value.
        choices: allowed values; empty for any.
        many: the value is a list of that kind, or one of them.
    """

    name: str
    kind: type
    choices: tuple[str, ...] = ()
    many: bool = False


def check_names(found: Collection[str], allowed: Collection[str], where: str) -> None:
    """Check the names in a section.

    Args:
        where: the section, for the message.

    Raises:
        SubjectBoothError: a name is unknown.
    """
    for name in found:
        if name in allowed:
            continue
        near = difflib.get_close_matches(name, allowed, 1, 0.5)
        needed = f"one of {', '.join(sorted(allowed))}"
        if len(allowed) > 20:
            needed = "an option that python -m trainer train --help lists"
        todo = f"use {near[0]}" if near else "correct or remove it"
        raise SubjectBoothError(f"unknown name {name[:60]!r} in {where}", needed, todo, where)


def check_value(option: Option, value: Any, where: str) -> Any:
    """Check the type of a value; returns it, a whole number as a float if that is the type.

    Raises:
        SubjectBoothError: another type, or none of the choices.
    """
    if option.many:
        parts = value if isinstance(value, list) else [value]
        if not parts:
            raise SubjectBoothError(f"{option.name} is an empty list", "one value or more", "add some", where)
        single = Option(option.name, option.kind, option.choices)
        return [check_value(single, part, where) for part in parts]
    wanted = option.kind
    if wanted is float and isinstance(value, int) and not isinstance(value, bool):
        value = float(value)
    if not isinstance(value, wanted) or (isinstance(value, bool) and wanted is not bool):
        raise SubjectBoothError(
            f"{option.name} = {_shown(value)} in {where}", _KINDS[wanted], "change the value", option.name
        )
    if option.choices and value not in option.choices:
        near = difflib.get_close_matches(str(value), option.choices, 1, 0.5)
        raise SubjectBoothError(
            f"{option.name} = {_shown(value)} in {where}",
            f"one of {', '.join(option.choices)}",
            f"use {near[0]}" if near else "choose one of them",
            option.name,
        )
    return value


def check_section(section: Any, options: Mapping[str, Option], where: str) -> dict[str, Any]:
    """Check the names and values of a section.

    Raises:
        SubjectBoothError: it is not a section, or a name or a value is wrong.
    """
    if not isinstance(section, dict):
        raise SubjectBoothError(f"{where} is {_shown(section)}", "a section of names and values", "change it", where)
    check_names(section, options, where)
    return {name: check_value(options[name], value, where) for name, value in section.items()}


def _shown(value: Any) -> str:
    text = repr(value) if not isinstance(value, bool) else str(value).lower()
    return text if len(text) <= 60 else f"{text[:60]}…"
