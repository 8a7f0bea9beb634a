"""One photo of the subject."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np


@dataclass(frozen=True)
class Photo:
    """One photo, before cropping.

    Attributes:
        pixels: uint8 [h, w, 3], sRGB.
        mask: float32 [h, w] in 0..1, 1 = the subject; None without a mask.
        caption: what the photo shows, including the token.
        name: a short label for messages; never written to a LoRA's metadata.
        is_cropped: whether the user has cropped this photo, so that its mask does not.
    """

    pixels: np.ndarray
    mask: np.ndarray | None
    caption: str
    name: str
    is_cropped: bool = False
