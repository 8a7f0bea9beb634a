"""Convert images with an embedded colour profile to sRGB."""

from __future__ import annotations

import io

import numpy as np
from PIL import Image

_SRGB_TOLERANCE = 4
"""Out of 255 levels. sRGB profiles differ from one another by less than this, in rounding and in the darkest tones."""


def to_srgb(image: Image.Image, profile: bytes | None) -> Image.Image:
    """Convert from the embedded profile (phones: Display P3; print: CMYK; renderers: linear light).

    A damaged profile, or one for another mode, is ignored.

    Args:
        image: of mode "RGB" or "CMYK"; other modes are returned unchanged.
        profile: the file's ICC profile, or None.
    """
    if not profile or image.mode not in ("RGB", "CMYK"):
        return image
    from PIL import ImageCms

    try:
        source = ImageCms.ImageCmsProfile(io.BytesIO(profile))
        if source.profile.xcolor_space.strip() != image.mode:
            return image
        transform = ImageCms.buildTransform(source, ImageCms.createProfile("sRGB"), image.mode, "RGB")
        if "srgb" in ImageCms.getProfileDescription(source).casefold() and _changes_nothing(transform):
            return image  # converting sRGB to sRGB would only add rounding errors
        return ImageCms.applyTransform(image, transform) or image
    except (ImageCms.PyCMSError, OSError, ValueError, TypeError):
        return image


def _changes_nothing(transform: object) -> bool:
    """Whether greys and pure colours of every brightness stay the same: a profile's name cannot be trusted."""
    from PIL import ImageCms

    levels = np.arange(256, dtype=np.uint8)
    ramps = np.zeros((4, 256, 3), np.uint8)
    ramps[0] = levels[:, None]
    for channel in range(3):
        ramps[1 + channel, :, channel] = levels
    shown = ImageCms.applyTransform(Image.fromarray(ramps), transform)  # type: ignore[arg-type]
    return shown is not None and int(np.abs(np.asarray(shown).astype(int) - ramps).max()) <= _SRGB_TOLERANCE
