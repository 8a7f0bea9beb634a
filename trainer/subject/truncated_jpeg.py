"""JPEG files whose data ends too early though the file ends properly: decoders fill what is missing with grey, unasked.

Such files come from interrupted copies that some program has closed, and from failing memory cards. A file that just
stops is refused by the decoder itself.
"""

from __future__ import annotations

import io
import re

import numpy as np
from PIL import Image

_START_OF_SCAN, _END = 0xDA, b"\xff\xd9"
_FRAMES = (0xC0, 0xC2)
"""Baseline to progressive."""
_MARKER = re.compile(rb"\xff[^\x00\xd0-\xd7\xff]")
"""Within compressed data: a marker that ends it. 0xFF 0x00 is data, 0xD0 to 0xD7 only restart the decoder."""
_NOISE = bytes(value for value in np.random.default_rng(0).integers(0, 255, 64).astype(np.uint8))  # without 0xFF
_PADDING = b"".join(_NOISE + bytes([0xFF, 0xD0 + number]) for number in range(8)) + _NOISE


def missing_rows(data: bytes) -> int:
    """Rows of pixels at the bottom of a JPEG that its file holds no data for; 0 for a whole one.

    The file is decoded as it is, and with noise put before its end. A decoder that has all its blocks by then skips the
    noise. One that still needs some takes it for them, and the pictures differ.

    Args:
        data: the file. What is no JPEG, or cannot be decoded, counts as whole: decoding it says more.
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
    except Exception:  # decoders raise nearly anything
        return 0
    rows = np.flatnonzero((whole != padded).reshape(len(whole), -1).any(axis=1))
    return round((len(whole) - int(rows[0])) * height / len(whole)) if len(rows) else 0


def _decoded(data: bytes) -> np.ndarray:
    """The picture at an eighth of its size, which costs a fraction of the time, but for one with its detail last."""
    with Image.open(io.BytesIO(data), formats=["JPEG"]) as image:
        if not image.info.get("progressive"):
            image.draft(None, (1, 1))
        image.load()
        return np.array(image)


def _parse(data: bytes) -> tuple[int | None, bool]:
    """Where the end marker of the first picture is, and whether a progressive one has all of its scans.

    Phones and cameras put more behind the first picture.
    """
    at, components, is_progressive = 2, 0, False
    finished: set[tuple[int, int]] = set()  # component and coefficient that some scan gives to the last bit
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
