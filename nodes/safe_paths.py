"""Keep names from workflows and the network inside their folders."""

from __future__ import annotations

from pathlib import Path, PurePosixPath, PureWindowsPath

from ..trainer.errors import SubjectBoothError


def inside(base: Path, name: str, what: str) -> Path:
    """``base / name``, if that is inside ``base`` after links are resolved.

    Args:
        base: one of ComfyUI's folders.
        name: a relative path from the user or a workflow, with ``/`` or ``\\`` as separator.
        what: what messages call it ("folder").

    Raises:
        SubjectBoothError: the name is absolute, contains ``..``, is invalid, or leads out of ``base`` through a link.
    """
    shown = name if len(name) <= 120 else name[:117] + "..."
    rejected = SubjectBoothError(
        f"{what} {shown!r} leads out of ComfyUI's {base.name} folder",
        f"something inside the {base.name} folder",
        f"copy the files into the {base.name} folder and use names relative to it",
        what,
    )
    # Accept both separators everywhere: workflows move between systems.
    windows, posix = PureWindowsPath(name), PurePosixPath(name)
    if windows.drive or windows.root or posix.is_absolute() or ".." in windows.parts:
        raise rejected
    try:
        path = (base / PurePosixPath(*windows.parts)).resolve()
        is_inside = path.is_relative_to(base.resolve())
    except (OSError, ValueError, RuntimeError):  # a NUL, a link loop, a name that is too long
        raise SubjectBoothError(
            f"{what} {shown!r} is not a valid name", "the name of a file or folder", "choose it again", what
        ) from None
    if not is_inside:
        raise rejected
    return path
