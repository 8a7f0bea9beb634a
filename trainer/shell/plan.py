"""``python -m trainer plan``: the memory plan of a training, which takes the same options."""

from __future__ import annotations

from collections.abc import Sequence

from . import train


def main(arguments: Sequence[str]) -> int:
    """Show the plan; returns the exit code."""
    return train.main([*arguments, "--plan"])
