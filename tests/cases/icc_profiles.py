"""Colour profiles made here: of primaries, of greys, and of inks by a table."""

from __future__ import annotations

import itertools
import struct

from PIL import Image, ImageCms

SRGB = ImageCms.ImageCmsProfile(ImageCms.createProfile("sRGB")).tobytes()

# Rows X, Y, Z (D50) of the primaries red, green and blue.
DISPLAY_P3 = ((0.5151, 0.2412, -0.0011), (0.2920, 0.6922, 0.0419), (0.1571, 0.0666, 0.7841))
WHITE = (0.9642, 1.0, 0.8249)


def _fixed(*numbers: float) -> bytes:
    return b"".join(struct.pack(">i", round(number * 65536)) for number in numbers)


def _xyz(numbers: tuple[float, float, float]) -> bytes:
    return b"XYZ \0\0\0\0" + _fixed(*numbers)


def _curve(gamma: float) -> bytes:
    return b"curv\0\0\0\0" + struct.pack(">IH", 1, round(gamma * 256))


def profile(space: bytes, tags: dict[bytes, bytes], *, pcs: bytes = b"XYZ ") -> bytes:
    """An ICC profile of version 2; `tags` by signature."""
    tags = {
        b"desc": b"desc\0\0\0\0\0\0\0\x05test\0" + b"\0" * 79,
        b"cprt": b"text\0\0\0\0none\0",
        b"wtpt": _xyz(WHITE),
        **tags,
    }
    table, body, at = b"", b"", 132 + 12 * len(tags)
    for name, content in tags.items():
        content += b"\0" * (-len(content) % 4)
        table += name + struct.pack(">II", at + len(body), len(content))
        body += content
    kind = b"prtr" if b"A2B0" in tags else b"mntr"
    header = struct.pack(">I4s4s4s4s4s", at + len(body), b"lcms", b"\x02\x40\0\0", kind, space, pcs)
    header += struct.pack(">6H", 2026, 1, 1, 0, 0, 0) + b"acsp" + b"\0" * 28 + _fixed(*WHITE)
    return header.ljust(128, b"\0") + struct.pack(">I", len(tags)) + table + body


def of_primaries(rows: tuple[tuple[float, float, float], ...], gamma: float = 2.2) -> bytes:
    tags = {
        name + kind: content
        for name, row in zip((b"r", b"g", b"b"), rows, strict=True)
        for kind, content in ((b"XYZ", _xyz(row)), (b"TRC", _curve(gamma)))
    }
    return profile(b"RGB ", tags)


def of_greys(gamma: float) -> bytes:
    return profile(b"GRAY", {b"kTRC": _curve(gamma)})


def of_inks() -> bytes:
    """CMYK whose inks swap roles: cyan prints yellow, yellow prints cyan."""
    identity = bytes(range(256))
    points: list[int] = []
    to_lab = ImageCms.buildTransform(
        ImageCms.createProfile("sRGB"), ImageCms.createProfile("LAB"), "RGB", "LAB"
    )
    for c, m, y, k in itertools.product((0.0, 1.0), repeat=4):
        rgb = [round(255 * (1 - ink) * (1 - k)) for ink in (y, m, c)]
        lab = ImageCms.applyTransform(Image.new("RGB", (1, 1), tuple(rgb)), to_lab)
        points += lab.getpixel((0, 0))
    table = b"mft1\0\0\0\0" + bytes((4, 3, 2, 0)) + _fixed(1, 0, 0, 0, 1, 0, 0, 0, 1)
    table += identity * 4 + bytes(points) + identity * 3
    return profile(b"CMYK", {b"A2B0": table}, pcs=b"Lab ")
