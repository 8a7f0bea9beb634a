"""Names that come from a workflow or over the network, and the folders they may not leave."""

from __future__ import annotations

from pathlib import Path, PurePosixPath, PureWindowsPath

from ..trainer.errors import SubjectBoothError


def inside(base: Path, name: str, what: str) -> Path:
    """``base / name``, if that is still inside ``base`` after links are followed.

    Args:
        base: a folder of ComfyUI's.
        name: a relative path as the user or a workflow wrote it, with ``/`` or ``\\`` between its parts.
        what: how messages call it ("folder").

    Raises:
        SubjectBoothError: absolute, with ``..`` in it, not a valid path, or leading out of ``base`` over a link.
    """
    shown = name if len(name) <= 120 else name[:117] + "..."
    refused = SubjectBoothError(
        f"{what} {shown!r} leads out of ComfyUI's {base.name} folder",
        f"something inside the {base.name} folder",
        f"copy the files into the {base.name} folder and name them from there",
        what,
    )
    # Both kinds of separator count everywhere: a workflow made on one system is opened on another.
    windows, posix = PureWindowsPath(name), PurePosixPath(name)
    if windows.drive or windows.root or posix.is_absolute() or ".." in windows.parts:
        raise refused
    try:
        path = (base / PurePosixPath(*windows.parts)).resolve()
        is_inside = path.is_relative_to(base.resolve())
    except (OSError, ValueError, RuntimeError):  # a NUL, an endless link, a name that is too long
        raise SubjectBoothError(
            f"{what} {shown!r} is not a valid name", "the name of a file or folder", "choose it again", what
        ) from None
    if not is_inside:
        raise refused
    return path
