"""Why a picture is skipped, in the words that the catalog keeps, and which of them may be over.

An index keeps a reason as its words alone, so those that are read again are written here or are
constants of `retrieval.images`, and those of earlier versions stay.
"""

from __future__ import annotations

import importlib.util
import re

from retrieval.images import (
    HEIF_MISSING,
    MAX_PIXELS,
    MEMORY_SHORT,
    ImageError,
    TooManyPixels,
    pixels_in_memory,
)

__all__ = ["BYTES_PER_PIXEL", "may_be_over", "of_bytes", "of_pixels"]

BYTES_PER_PIXEL = 4
"""Bytes that a file may have for each pixel that is read."""

_ADVICE = "; `enn search index --max-pixels {}` reads it"
_ADVISED = re.compile(r"--max-pixels (\d+)")
_CLAIMED = re.compile(r"(\d+) x (\d+) pixels are more than ")
# The words of version 0.1 for a format that it did not read.
_NO_FORMAT_0_1 = "not a JPEG, PNG, WebP, TIFF, GIF or HEIC image"


def of_pixels(error: TooManyPixels) -> str:
    """Too many pixels, and with which limit they are read, if there is one."""
    return str(error) + ("" if error.needed is None else _ADVICE.format(error.needed))


def of_bytes(error: ImageError, size: int) -> str:
    """A file of `size` bytes is too large, and with which limit it is read."""
    return str(error) + _ADVICE.format(max(MAX_PIXELS + 1, -(-size // BYTES_PER_PIXEL)))


def may_be_over(reason: str, max_pixels: int) -> bool:
    """Whether a picture that was skipped for a reason may be readable now, its file unchanged.

    Args:
        reason: that the catalog keeps.
        max_pixels: limit of the update that asks.
    """
    if claimed := _CLAIMED.match(reason):
        if advised := _ADVISED.search(reason):
            return int(advised[1]) <= max_pixels
        # No advice was possible, or the version was one that gave none.
        return int(claimed[1]) * int(claimed[2]) <= pixels_in_memory()
    if reason == HEIF_MISSING:
        return importlib.util.find_spec("pillow_heif") is not None
    return reason in (MEMORY_SHORT, _NO_FORMAT_0_1)
