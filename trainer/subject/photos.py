"""Decode image files to upright 8-bit RGB and, with transparency, a mask."""

from __future__ import annotations

import contextlib
import os
import re
import threading
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image, ImageFile, ImageOps

from ..errors import SubjectBoothError
from .colour_profile import to_srgb
from .kohya_folder import reject_kohya_folder
from .notes import Note
from .pixel_modes import alpha_of, to_8bit
from .truncated_jpeg import missing_rows

# Every decoder is attack surface (Pillow's EPS plugin starts Ghostscript), so only formats that cameras, phones,
# browsers and ComfyUI write are accepted.
FORMATS = ("JPEG", "MPO", "PNG", "WEBP", "AVIF", "GIF", "BMP", "TIFF")
SUFFIXES = frozenset((".jpg", ".jpeg", ".jfif", ".png", ".webp", ".avif", ".gif", ".bmp", ".tif", ".tiff"))
# Listed so that a folder of such photos gets advice on how to convert them, instead of "no images found".
RAW_SUFFIXES = frozenset((".cr2", ".cr3", ".nef", ".arw", ".dng"))
UNREADABLE_SUFFIXES = RAW_SUFFIXES | {".heic", ".heif", ".psd", ".jxl"}

MIN_SIDE = 32
"""Pixels. Smaller images have too little detail to learn a subject from."""
MAX_ASPECT = 8.0
"""Long side over short side: beyond this, any square crop shows only a sliver of the image."""
MAX_PIXELS = 120_000_000
"""Width times height: enough for a 108-megapixel phone photo. 120 million RGBA pixels take 480 MB decoded."""
MAX_SHORT_SIDE = 2048
"""Pixels. Larger images are scaled down to this when read: twice the largest common training size."""

ORIENTATION = 0x0112
"""EXIF's tag for it."""

_MAX_MISSING_ROWS = 16
"""Pixels: one row of JPEG blocks, which some cameras get wrong."""

_WHITE = (255, 255, 255, 255)
_DECODER_LOCK = threading.Lock()


@dataclass(frozen=True)
class DecodedPhoto:
    """The content of one image file.

    Attributes:
        pixels: uint8 [h, w, 3], upright, sRGB, transparency composited over white.
        mask: float32 [h, w] in 0..1 (1 = opaque), None if everything is opaque.
        notes: what was changed or left out, such as "only the first frame is used".
        orientation: EXIF orientation of the stored image, which ``pixels`` no longer have; 1: upright.
    """

    pixels: np.ndarray
    mask: np.ndarray | None
    notes: tuple[Note, ...] = ()
    orientation: int = 1


def list_photos(folder: Path) -> list[Path]:
    """The image files directly in ``folder``, in natural order (2 before 10), without hidden ones.

    Raises:
        SubjectBoothError: the folder is missing or unreadable, or has no images.
    """
    try:
        entries = [entry for entry in folder.iterdir() if entry.is_file() and not entry.name.startswith(".")]
    except OSError as error:
        raise SubjectBoothError(
            f"the folder {folder.name[:80]!r} cannot be read ({_reason(error)})",
            "a folder with images",
            "check the folder's name and permissions",
        ) from error
    wanted = SUFFIXES | UNREADABLE_SUFFIXES
    photos = sorted((e for e in entries if e.suffix.lower() in wanted), key=lambda entry: natural_key(entry.name))
    if not photos:
        reject_kohya_folder(folder, SUFFIXES)
        raise SubjectBoothError(
            f"no images found in the folder {folder.name!r} ({len(entries)} other files)",
            "3 to 5 photos as JPEG, PNG or WebP directly in it",
            "put the photos there, or choose another folder",
        )
    return photos


def natural_key(name: str) -> tuple[tuple[int, str], ...]:
    """Case-insensitive sort key that puts ``dog2`` before ``dog10``."""
    parts = re.findall(r"(\d+)|(\D+)", name.casefold())
    return tuple((int(digits), "") if digits else (-1, text) for digits, text in parts)


def read_photo(path: Path, name: str | None = None) -> DecodedPhoto:
    """Decode one image file.

    Applies the EXIF orientation, converts colour profiles to sRGB, scales 16-bit and floating-point values to 8 bits,
    turns transparency into the mask, takes the first frame of an animation, and scales a short side above
    :data:`MAX_SHORT_SIDE` down to it.

    Args:
        path: the file.
        name: its name in messages; None for the file's name.

    Raises:
        SubjectBoothError: missing, empty, damaged, not an image, too small, too large, or fully transparent.
    """
    name = name or path.name
    _check_file(path, name)
    if path.suffix.lower() in RAW_SUFFIXES:  # many are TIFF files, from which Pillow would read only the thumbnail
        raise SubjectBoothError(f"{name} is a camera RAW file", "JPEG, PNG or WebP", "export it as JPEG")
    notes: list[Note] = []
    try:
        with _strict_decoding(), Image.open(path, formats=_available_formats()) as image:
            check_size(image.size, name)
            _note_frames(image, name, notes)
            _check_complete(image, path, name, notes)
            orientation = image.getexif().get(ORIENTATION, 1)
            decoded = _decode(image)
    except SubjectBoothError:
        raise
    # Decoders raise almost anything on a damaged file: SyntaxError, struct.error, zlib.error, KeyError, ...
    except Exception as error:
        raise _unreadable(path, name, error) from error
    pixels, mask = decoded
    if mask is not None and not mask.any():
        raise SubjectBoothError(
            f"{name} is fully transparent",
            "an image that shows the subject",
            "leave this file out",
        )
    if mask is not None:
        notes.append(Note("white", name))
    return DecodedPhoto(pixels, mask, tuple(notes), orientation)


def _check_file(path: Path, name: str) -> None:
    try:
        if not path.is_file():
            what = "is a folder" if path.is_dir() else "does not exist"
            raise SubjectBoothError(f"{name} {what}", "an image file", "choose the image again")
        size = path.stat().st_size
    except (OSError, ValueError) as error:
        raise SubjectBoothError(
            f"{name[:200]} cannot be opened ({_reason(error)})", "an image file", "choose the image again"
        ) from error
    if size == 0:
        raise SubjectBoothError(
            f"{name} is empty (0 bytes)", "an image", "copy or download the file again, or leave it out"
        )


def check_size(size: tuple[int, int], name: str) -> None:
    """Check an image's ``size`` (width, height), as given in the file's header.

    Raises:
        SubjectBoothError: too small, too large or too narrow.
    """
    width, height = size
    given = f"{name} is {width}x{height} pixels"
    if width * height > MAX_PIXELS:
        raise SubjectBoothError(
            given, f"at most {MAX_PIXELS // 1_000_000} million pixels", "scale the image down first"
        )
    if min(width, height) < MIN_SIDE:
        raise SubjectBoothError(
            given, f"at least {MIN_SIDE} pixels on each side", "use a larger image, or leave this one out"
        )
    if max(width, height) > MAX_ASPECT * min(width, height):
        raise SubjectBoothError(
            given, f"a long side of at most {MAX_ASPECT:.0f} times the short one", "crop it around the subject"
        )


def _note_frames(image: Image.Image, name: str, notes: list[Note]) -> None:
    frames = getattr(image, "n_frames", 1)
    if frames <= 1 or image.format == "MPO":  # phones append a preview or a depth map to a JPEG
        return
    kind = "pages" if image.format == "TIFF" else "frames"
    notes.append(Note("frames", name, f"{frames} {kind}"))


def _check_complete(image: Image.Image, path: Path, name: str, notes: list[Note]) -> None:
    """Reject a JPEG whose data ends early; if only one row of blocks is missing, add a note instead."""
    if image.format not in ("JPEG", "MPO"):
        return  # other decoders detect truncated files themselves
    missing = missing_rows(path.read_bytes())
    if missing > _MAX_MISSING_ROWS:
        share = max(1, round(100 * missing / image.height))
        raise SubjectBoothError(
            f"{name} is damaged or truncated (the lower {share} % is missing)",
            "a complete image",
            "copy or download the file again, or leave it out",
        )
    if missing:
        notes.append(Note("torn", name))


def _decode(image: Image.Image) -> tuple[np.ndarray, np.ndarray | None]:
    """Pixels and mask of an opened image; see :func:`read_photo`."""
    factor = MAX_SHORT_SIDE / min(image.size)
    if factor < 1:
        # JPEG can be decoded at 1/2, 1/4 or 1/8 of its size, which saves memory; other formats ignore this.
        image.draft(None, (int(image.width * factor) + 1, int(image.height * factor) + 1))
    image.load()
    profile = image.info.get("icc_profile")
    image = ImageOps.exif_transpose(image)
    image = to_8bit(image)
    alpha = alpha_of(image)
    if alpha is not None:
        rgba = image.convert("RGBA")
        rgba.putalpha(alpha)
        image = Image.alpha_composite(Image.new("RGBA", rgba.size, _WHITE), rgba).convert("RGB")
    elif image.mode != "RGB":
        image = to_srgb(image, profile) if image.mode == "CMYK" else image
        image = image.convert("RGB")
    image = to_srgb(image, profile)
    factor = MAX_SHORT_SIDE / min(image.size)
    if factor < 1:
        size = (max(1, round(image.width * factor)), max(1, round(image.height * factor)))
        image = image.resize(size, Image.Resampling.LANCZOS)
        alpha = alpha.resize(size, Image.Resampling.BILINEAR) if alpha is not None else None
    mask = np.asarray(alpha, dtype=np.float32) / 255.0 if alpha is not None else None
    return np.array(image, dtype=np.uint8), mask


def _available_formats() -> list[str]:
    """The :data:`FORMATS` that this build of Pillow supports (AVIF is new, WebP optional)."""
    Image.init()
    return [name for name in FORMATS if name in Image.OPEN]


@contextlib.contextmanager
def _strict_decoding() -> Iterator[None]:
    """Reject truncated images, even if another pack has set Pillow, process-wide, to fill them with grey."""
    with _DECODER_LOCK:  # concurrent threads would restore each other's value of a process-wide setting
        before = ImageFile.LOAD_TRUNCATED_IMAGES
        ImageFile.LOAD_TRUNCATED_IMAGES = False
        try:
            yield
        finally:
            ImageFile.LOAD_TRUNCATED_IMAGES = before


def _unreadable(path: Path, name: str, error: Exception) -> SubjectBoothError:
    head = b""
    with contextlib.suppress(OSError), path.open("rb") as file:
        head = file.read(32)
    if isinstance(error, Image.DecompressionBombError):
        return SubjectBoothError(
            f"the header of {name} gives a size far beyond that of any photo",
            f"at most {MAX_PIXELS // 1_000_000} million pixels",
            "scale the image down first, or leave it out",
        )
    if isinstance(error, MemoryError):
        return SubjectBoothError(f"{name} does not fit into memory", "a smaller image", "scale the image down first")
    if head[4:8] == b"ftyp" and head[8:12] in (b"heic", b"heix", b"hevc", b"mif1", b"msf1"):
        return SubjectBoothError(
            f"{name} is a HEIC image",
            "JPEG, PNG or WebP",
            "export it as JPEG (on an iPhone: Settings, Camera, Formats, Most Compatible)",
        )
    if _has_image_signature(head):
        return SubjectBoothError(
            f"{name} is damaged or truncated",
            "a complete image",
            "copy or download the file again, or leave it out",
        )
    return SubjectBoothError(
        f"{name} is not an image", "JPEG, PNG, WebP, AVIF, GIF, BMP or TIFF", "convert it, or leave it out"
    )


def _has_image_signature(head: bytes) -> bool:
    signatures = (b"\xff\xd8\xff", b"\x89PNG\r\n\x1a\n", b"GIF8", b"BM", b"II*\x00", b"MM\x00*")
    return head.startswith(signatures) or (head[:4] == b"RIFF" and head[8:12] == b"WEBP") or head[4:12] == b"ftypavif"


def _reason(error: Any) -> str:
    """The operating system's message without the path, which may be private."""
    return os.strerror(error.errno) if isinstance(error, OSError) and error.errno else type(error).__name__
