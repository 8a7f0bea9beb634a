"""What reading a photo has changed or left out, told once for all photos that it happened to."""

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
        "The transparent part of {names} becomes white: masked_loss leaves it out of what is learned.",
        "The transparent parts of {names} become white: masked_loss leaves them out of what is learned.",
    ),
    "torn": (
        "{names} is cut off: its last rows of pixels are missing. Copy or download it again.",
        "{names} are cut off: their last rows of pixels are missing. Copy or download them again.",
    ),
    "empty mask": ("The mask of {names} is empty and is not used.", "The masks of {names} are empty and are not used."),
}


@dataclass(frozen=True)
class Note:
    """Something to say about one photo.

    Attributes:
        kind: "frames", "white", "torn" or "empty mask".
        name: the photo's.
        detail: what the sentence about a single photo says besides, such as "3 frames".
    """

    kind: str
    name: str
    detail: str = ""

    def __str__(self) -> str:
        return sentences([self])[0]


def sentences(notes: Iterable[Note]) -> list[str]:
    """One sentence a kind, however many photos there are, in the order in which the kinds come up."""
    kinds: dict[str, list[Note]] = {}
    for note in notes:
        kinds.setdefault(note.kind, []).append(note)
    return [
        _SENTENCES[kind][len(found) > 1].format(names=join_names([note.name for note in found]), detail=found[0].detail)
        for kind, found in kinds.items()
    ]


def join_names(names: Sequence[str], most: int = 3) -> str:
    """``"a.png, b.png and 10 more"``: the first ones of a list that may be long."""
    if len(names) <= most:
        return " and ".join([", ".join(names[:-1]), names[-1]] if len(names) > 1 else names)
    shown = names[: most - 1]
    return f"{', '.join(shown)} and {len(names) - len(shown)} more"
