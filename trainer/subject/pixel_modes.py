"""Pillow's many kinds of pixels, as 8-bit colour and transparency."""

from __future__ import annotations

import numpy as np
from PIL import Image


def to_8bit(image: Image.Image) -> Image.Image:
    """16-bit, 32-bit and floating-point greys -> "L" (or "LA"); Pillow's own convert clips them to white."""
    if not image.mode.startswith(("I", "F")):
        return image
    values = np.asarray(image).astype(np.float64)
    if not np.isfinite(values).all():
        raise ValueError("the picture holds values that are not numbers")
    # Files do not say what their white is, except that 16-bit ones mean 65535.
    peak = float(values.max())
    if image.mode.startswith("I;16") or (image.mode == "I" and 255 < peak <= 65535):
        white = 65535.0
    elif image.mode == "F" and peak <= 1.0:
        white = 1.0
    else:
        white = 255.0 if peak <= 255 else peak
    grey = Image.fromarray(np.clip(np.rint(values * (255.0 / white)), 0, 255).astype(np.uint8))
    transparent = image.info.get("transparency")
    if isinstance(transparent, int):  # a 16-bit grey PNG names one value as transparent
        opaque = np.where(values == transparent, 0, 255).astype(np.uint8)
        grey.putalpha(Image.fromarray(opaque))
    return grey


def alpha_of(image: Image.Image) -> Image.Image | None:
    """The 8-bit alpha channel, from a band, a palette or a colour key; None when everything is opaque."""
    keyed = "transparency" in image.info and image.mode in ("1", "L", "P", "RGB")
    if not keyed and image.mode not in ("LA", "La", "PA", "RGBA", "RGBa"):
        return None
    alpha = image.convert("RGBA").getchannel("A")
    return alpha if alpha.getextrema() != (255, 255) else None
