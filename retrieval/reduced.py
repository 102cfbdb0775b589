"""Decoding a picture at a part of its size, so that memory is that of the part."""

from __future__ import annotations

import io
from typing import Any

__all__ = ["is_plausible", "reduce"]

# What claims to be larger than the limit is decoded at a part of its size only if it is at most
# so many times as large, and holds a byte for so many pixels: a small file must not cost memory.
_MOST_TIMES = 32
_PIXELS_PER_BYTE = {"JPEG": 2000, "TIFF": 2000, "JPEG2000": 20_000}
# JPEG 2000 keeps books on all blocks of a picture, also on those that are left out: with blocks of
# less than this many pixels they would be larger than the picture.
_LEAST_BLOCK = 256
# Pages of a TIFF file among which a smaller copy of the first one is looked for.
_OVERVIEWS = 32
_SUBFILE_TAG = 0x00FE


def is_plausible(image: Any, limit: int, size: int) -> bool:
    """Whether a file of `size` bytes that claims more pixels than the limit is worth a try."""
    pixels = image.width * image.height
    per_byte = _PIXELS_PER_BYTE.get(image.format, 0)
    return pixels <= _MOST_TIMES * limit and pixels <= per_byte * size


def reduce(image: Any, stream: io.BytesIO, limit: int, side: int | None) -> bool:
    """Have an image decoded at a part of its size, where its format can do that.

    Args:
        image: what PIL opened and did not load yet.
        stream: its file, at the place where opening left it.
        limit: pixels that it may have.
        side: pixels (both ways) that it shall keep, if it has them now.

    Returns:
        Whether it will have no more pixels than the limit.
    """
    width, height = image.size
    least = next(n for n in range(64) if (width >> n) * (height >> n) <= limit)
    if image.format == "JPEG":
        if not _in_one_scan(image, stream):
            return False  # all its coefficients would be held, at up to 8 bytes a pixel
        shape = (width >> least, height >> least)
        image.draft(image.mode, shape if side is None else tuple(min(side, n) for n in shape))
    elif image.format == "JPEG2000":
        levels, block = _wavelets(stream.getvalue())
        if least and block < _LEAST_BLOCK:
            return False
        shrink = (min(width, height) // side).bit_length() - 1 if side else 0
        power = min(max(least, shrink), levels)
        image.reduce = power
        return (width >> power) * (height >> power) <= limit
    elif image.format == "TIFF":
        return _seek_overview(image, limit)
    return bool(image.width * image.height <= limit)


def _wavelets(data: bytes) -> tuple[int, int]:
    """How often a JPEG 2000 picture can be halved, and the pixels of its blocks."""
    at = data.find(b"\xff\x52", 0, 65536)  # the marker COD
    if not 0 <= at < len(data) - 12:
        return 0, 0
    return data[at + 9], 1 << (data[at + 10] + data[at + 11] + 4)


def _in_one_scan(image: Any, stream: io.BytesIO) -> bool:
    """Whether a JPEG's blocks follow one another, so that it is decoded without being held."""
    layers = len(image.getbands())
    end = stream.tell()
    head = stream.getvalue()[max(0, end - 2 * layers - 8) : end]
    return not image.info.get("progressive") and head.startswith(
        bytes((0xFF, 0xDA, 0, 6 + 2 * layers, layers))
    )


def _seek_overview(image: Any, limit: int) -> bool:
    """Turn to a TIFF's largest page that is its first one in small; whether there is one."""
    shape = image.width / image.height
    best, pixels = 0, 0
    for page in range(1, _OVERVIEWS):
        try:
            image.seek(page)
        except EOFError:
            break
        is_small = image.tag_v2.get(_SUBFILE_TAG, 0) & 1
        is_alike = abs(image.width - shape * image.height) <= max(2.0, 0.02 * image.width)
        if is_small and is_alike and pixels < image.width * image.height <= limit:
            best, pixels = page, image.width * image.height
    image.seek(best)
    return best > 0
