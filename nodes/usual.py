"""A learning rate, rank or alpha of 0: what is usual for the connected model."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from .wired.families import WiredFamily


def with_usual(settings: Mapping[str, Any], family: WiredFamily) -> dict[str, Any]:
    """The settings with numbers in place of 0, so that a run is the same as one that names them."""
    found = dict(settings)
    for name, usual in {"learning_rate": family.learning_rate, "rank": family.rank}.items():
        if _is_zero(found.get(name)):
            found[name] = usual
    if _is_zero(found.get("network_alpha")):
        found["network_alpha"] = float(found["rank"])
    return found


def usual_line(given: Mapping[str, Any], chosen: Mapping[str, Any], family: WiredFamily) -> list[str]:
    """One line that names the numbers that stand for 0: "as usual for Z-Image: rank 32"."""
    numbers = [f"{name} {chosen[name]:g}" for name in _NAMES if _is_zero(given.get(name))]
    return [f"as usual for {family.name}: {', '.join(numbers)}"] if numbers else []


def without_usual(settings: Mapping[str, Any]) -> dict[str, Any]:
    """The settings without those of 0, where the connected model is not known."""
    return {name: value for name, value in settings.items() if not (name in _NAMES and _is_zero(value))}


_NAMES = ("learning_rate", "rank", "network_alpha")


def _is_zero(value: Any) -> bool:
    return isinstance(value, (int, float)) and not isinstance(value, bool) and value == 0
