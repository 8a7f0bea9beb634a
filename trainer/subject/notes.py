"""Notes about changes made when reading photos, grouped into one sentence per kind."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass

# Sentences for one photo and for several.
_SENTENCES = {
    "frames": (
        "{names} has {detail}: only the first is used.",
        "{names} have several frames or pages: only the first is used.",
    ),
    "white": (
        "The transparent part of {names} becomes white; with masked_loss it is not trained on.",
        "The transparent parts of {names} become white; with masked_loss they are not trained on.",
    ),
    "torn": (
        "{names} is truncated: its last rows of pixels are missing. Copy or download it again.",
        "{names} are truncated: their last rows of pixels are missing. Copy or download them again.",
    ),
    "empty mask": ("The mask of {names} is empty and ignored.", "The masks of {names} are empty and ignored."),
}


@dataclass(frozen=True)
class Note:
    """A note about one photo.

    Attributes:
        kind: "frames", "white", "torn" or "empty mask".
        name: the photo's name.
        detail: a detail for the sentence about a single photo, such as "3 frames".
    """

    kind: str
    name: str
    detail: str = ""

    def __str__(self) -> str:
        return sentences([self])[0]


def sentences(notes: Iterable[Note]) -> list[str]:
    """One sentence per kind, however many photos it concerns, in order of first occurrence."""
    kinds: dict[str, list[Note]] = {}
    for note in notes:
        kinds.setdefault(note.kind, []).append(note)
    return [
        _SENTENCES[kind][len(found) > 1].format(names=join_names([note.name for note in found]), detail=found[0].detail)
        for kind, found in kinds.items()
    ]


def join_names(names: Sequence[str], most: int = 3) -> str:
    """``"a.png, b.png and 10 more"``: shorten a list of names."""
    if len(names) <= most:
        return " and ".join([", ".join(names[:-1]), names[-1]] if len(names) > 1 else names)
    shown = names[: most - 1]
    return f"{', '.join(shown)} and {len(names) - len(shown)} more"
