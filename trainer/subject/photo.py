"""One photo of the subject."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np


@dataclass(frozen=True)
class Photo:
    """One photo as it was read.

    Attributes:
        pixels: uint8 [h, w, 3], sRGB.
        mask: float32 [h, w] in 0..1, 1 = the subject; None when it has none.
        caption: what the photo shows, token included.
        name: a short label for messages; never written into a LoRA's metadata.
    """

    pixels: np.ndarray
    mask: np.ndarray | None
    caption: str
    name: str
