"""Colours by the profile that a picture carries: what was meant, in sRGB.

A photo in Display P3 or Adobe RGB looks pale, and one whose profile swaps channels looks like
another, if its numbers are taken for sRGB. Colours are matched colorimetrically, with the black
points laid on each other: what sRGB has too stays exactly what it is. The other intent for photos,
perceptual, moves all colours, by tables that only profiles of printers have, each maker's its own.
"""

from __future__ import annotations

import io
from functools import lru_cache

import numpy as np
from PIL import Image, ImageCms

__all__ = ["to_srgb"]

# Profiles of printing presses reach 3 MB; what is larger is none.
_MAX_PROFILE_BYTES = 8 * 2**20
# A profile that moves no colour of a grid by more levels than this is sRGB's.
_SAME_LEVELS = 2
# One under which black, white and the strong colours lie closer than this is none.
_LEAST_SPREAD = 24
_GRID = 7
_MODES = {b"RGB ": "RGB", b"GRAY": "L", b"CMYK": "CMYK", b"Lab ": "LAB"}


def to_srgb(image: Image.Image, profile: object) -> Image.Image:
    """An 8-bit image in sRGB's colours.

    Args:
        image: of any mode but 16 and 32 bits; transparency is kept.
        profile: an ICC profile as a file carries it. One that is damaged, of another kind of
            colours than the image's, or that makes no sense is passed over.

    Returns:
        The image itself where there is nothing to change; else one in RGB or RGBA.
    """
    if not isinstance(profile, bytes) or not 128 < len(profile) <= _MAX_PROFILE_BYTES:
        return image
    mode = _MODES.get(profile[16:20])
    source = _in_mode(image, mode)
    if mode is None or source is None:
        return image
    transform = _transform(profile, mode)
    if transform is None:
        return image
    result = ImageCms.applyTransform(source, transform)
    if result is None:
        return image
    if image.has_transparency_data:
        result.putalpha(image.convert("RGBA").getchannel("A"))
    return result


def _in_mode(image: Image.Image, mode: str | None) -> Image.Image | None:
    """The image's colours in a profile's mode; None if they are of another kind."""
    if image.mode == mode:
        return image
    grey = image.mode in ("1", "L", "LA", "La")
    if mode == "L":
        return image.convert("L") if grey else None
    # Grey pictures often carry the profile of the colours they were made from.
    coloured = grey or image.mode in ("P", "PA", "RGBA", "RGBa", "RGBX", "YCbCr")
    return image.convert("RGBA").convert("RGB") if mode == "RGB" and coloured else None


@lru_cache(maxsize=32)
def _transform(profile: bytes, mode: str) -> ImageCms.ImageCmsTransform | None:
    """From a profile's colours to sRGB; None if that changes nothing or makes no sense."""
    try:
        transform = ImageCms.buildTransform(
            ImageCms.getOpenProfile(io.BytesIO(profile)),
            ImageCms.createProfile("sRGB"),
            mode,
            "RGB",
            ImageCms.Intent.RELATIVE_COLORIMETRIC,
            # Several threads use one transform at once, so it must not remember the last pixel.
            ImageCms.Flags.BLACKPOINTCOMPENSATION | ImageCms.Flags.NOCACHE,
        )
        grid = _grid(mode)
        result = ImageCms.applyTransform(grid, transform)
    except Exception:  # LittleCMS' errors are many, and a profile is no reason to lose a picture
        return None
    if result is None:
        return None
    found = np.asarray(result, np.int16).reshape(-1, 3)
    if np.ptp(found, axis=0).max() < _LEAST_SPREAD:
        return None
    if mode in ("RGB", "L"):
        plain = np.asarray(grid.convert("RGB"), np.int16).reshape(-1, 3)
        if np.abs(found - plain).max() <= _SAME_LEVELS:
            return None
    return transform


def _grid(mode: str) -> Image.Image:
    """Colours evenly spread over a mode, as one row of pixels."""
    channels = len(Image.new(mode, (1, 1)).getbands())
    steps = np.linspace(0, 255, 64 if channels == 1 else _GRID).round().astype(np.uint8)
    values = np.stack(np.meshgrid(*[steps] * channels), -1).reshape(1, -1, channels)
    if channels == 1:
        return Image.fromarray(values[..., 0])
    return Image.frombytes(mode, (values.shape[1], 1), values.tobytes())
