"""Convert Pillow's many pixel modes to 8-bit colour and alpha."""

from __future__ import annotations

import numpy as np
from PIL import Image


def to_8bit(image: Image.Image) -> Image.Image:
    """Scale 16-bit, 32-bit and floating-point greyscale to "L" (or "LA"); Pillow's convert() clips it to white.

    Raises:
        ValueError: the image contains NaN or infinity.
    """
    if not image.mode.startswith(("I", "F")):
        return image
    values = np.asarray(image).astype(np.float64)
    if not np.isfinite(values).all():
        raise ValueError("the image contains NaN or infinity")
    # Files do not define their white level, except for 16-bit ones, where it is 65535.
    peak = float(values.max())
    if image.mode.startswith("I;16") or (image.mode == "I" and 255 < peak <= 65535):
        white = 65535.0
    elif image.mode == "F" and peak <= 1.0:
        white = 1.0
    else:
        white = 255.0 if peak <= 255 else peak
    grey = Image.fromarray(np.clip(np.rint(values * (255.0 / white)), 0, 255).astype(np.uint8))
    transparent = image.info.get("transparency")
    if isinstance(transparent, int):  # a 16-bit greyscale PNG can declare one value transparent
        opaque = np.where(values == transparent, 0, 255).astype(np.uint8)
        grey.putalpha(Image.fromarray(opaque))
    return grey


def alpha_of(image: Image.Image) -> Image.Image | None:
    """The 8-bit alpha channel, from a band, a palette or a colour key; None if everything is opaque."""
    keyed = "transparency" in image.info and image.mode in ("1", "L", "P", "RGB")
    if not keyed and image.mode not in ("LA", "La", "PA", "RGBA", "RGBa"):
        return None
    alpha = image.convert("RGBA").getchannel("A")
    return alpha if alpha.getextrema() != (255, 255) else None
