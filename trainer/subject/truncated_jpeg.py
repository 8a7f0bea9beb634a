"""Detect JPEG files whose image data ends early but which have a proper end marker: decoders fill the rest with grey.

Such files come from interrupted copies that some program has finalised, and from failing memory cards. A file without
an end marker is rejected by the decoder itself.
"""

from __future__ import annotations

import io
import re

import numpy as np
from PIL import Image

_START_OF_SCAN, _END = 0xDA, b"\xff\xd9"
_FRAMES = (0xC0, 0xC2)
"""Start-of-frame markers, baseline to progressive."""
_MARKER = re.compile(rb"\xff[^\x00\xd0-\xd7\xff]")
"""A marker that ends compressed data. 0xFF 0x00 is data, and 0xD0 to 0xD7 only restart the decoder."""
_NOISE = bytes(value for value in np.random.default_rng(0).integers(0, 255, 64).astype(np.uint8))  # without 0xFF
_PADDING = b"".join(_NOISE + bytes([0xFF, 0xD0 + number]) for number in range(8)) + _NOISE


def missing_rows(data: bytes) -> int:
    """Number of pixel rows at the bottom of a JPEG without data; 0 for a complete file.

    Decodes the file twice: as it is, and with noise inserted before the end marker. A decoder that already has all
    blocks skips the noise; one that still needs some decodes it, and the two images differ.

    Args:
        data: the file. Other formats and undecodable files return 0, because decoding them gives a better error.
    """
    end, has_all_scans = _parse(data)
    if end is None:
        return 0
    try:
        with Image.open(io.BytesIO(data), formats=["JPEG"]) as image:
            height = image.height
        if not has_all_scans:
            return height
        whole, padded = _decoded(data), _decoded(data[:end] + _PADDING + _END)
    except Exception:  # decoders raise almost anything
        return 0
    rows = np.flatnonzero((whole != padded).reshape(len(whole), -1).any(axis=1))
    return round((len(whole) - int(rows[0])) * height / len(whole)) if len(rows) else 0


def _decoded(data: bytes) -> np.ndarray:
    """The image at 1/8 of its size, which is much faster; at full size if progressive, where the detail comes last."""
    with Image.open(io.BytesIO(data), formats=["JPEG"]) as image:
        if not image.info.get("progressive"):
            image.draft(None, (1, 1))
        image.load()
        return np.array(image)


def _parse(data: bytes) -> tuple[int | None, bool]:
    """The offset of the first image's end marker, and whether a progressive image has all of its scans.

    Phones and cameras append more data after the first image.
    """
    at, components, is_progressive = 2, 0, False
    finished: set[tuple[int, int]] = set()  # (component, coefficient) pairs with all their bits
    while data[at : at + 1] == b"\xff" and at + 4 <= len(data):
        marker, body = data[at + 1], at + 4
        if marker == _END[1]:
            break
        if marker == 0xFF:  # filler
            at += 1
            continue
        at += 2 + int.from_bytes(data[at + 2 : at + 4], "big")
        if _FRAMES[0] <= marker <= _FRAMES[1] and body + 5 < len(data):
            components, is_progressive = data[body + 5], marker == _FRAMES[1]
        if marker == _START_OF_SCAN and body < at <= len(data):
            first, last, approximation = data[at - 3 : at]
            if approximation % 16 == 0:
                scanned = data[body + 1 : at - 3 : 2]
                finished |= {(component, number) for component in scanned for number in range(first, last + 1)}
            found = _MARKER.search(data, at)
            if found is None:
                return None, True
            at = found.start()
    has_all_scans = not is_progressive or len(finished) >= 64 * components
    return (at if data[at : at + 2] == _END else None), has_all_scans
