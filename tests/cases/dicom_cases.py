"""DICOM files as scanners, archives and old workstations leave them; made here, without voxels."""

from __future__ import annotations

import bz2
import gzip
import struct

__all__ = ["DICOMS", "NO_DICOM", "explicit", "implicit", "part10"]

_LONG = {b"OB", b"SQ", b"UN", b"UT"}
_ELEMENTS = (
    (0x0008, 0x0005, b"CS", b"ISO_IR 100"),
    (0x0008, 0x0008, b"CS", b"ORIGINAL\\PRIMARY\\M\\ND "),
    (0x0008, 0x0016, b"UI", b"1.2.840.10008.5.1.4.1.1.4\0"),
    (0x0008, 0x0060, b"CS", b"MR"),
    (0x0010, 0x0010, b"PN", b"NOBODY"),
    (0x7FE0, 0x0010, b"OW", bytes(range(256)) * 40),
)


def explicit(order: str = "<", elements=_ELEMENTS) -> bytes:
    """A data set with its types written, without preamble."""
    pieces = []
    for group, number, kind, value in elements:
        long = kind in _LONG or kind == b"OW"
        size = bytes(2) + struct.pack(order + "I", len(value)) if long else None
        pieces += [struct.pack(order + "HH", group, number), kind]
        pieces += [size or struct.pack(order + "H", len(value)), value]
    return b"".join(pieces)


def implicit(*, group_length: bool = True) -> bytes:
    """As most files without preamble are; ACR-NEMA's begin with the length of their group."""
    pieces = [struct.pack("<HHII", 8, 0, 4, 80)] if group_length else []
    for group, number, _, value in _ELEMENTS:
        pieces += [struct.pack("<HHI", group, number, len(value)), value]
    return b"".join(pieces)


def part10() -> bytes:
    """With its preamble."""
    meta = ((0x0002, 0x0000, b"UL", struct.pack("<I", 28)),)
    meta += ((0x0002, 0x0010, b"UI", b"1.2.840.10008.1.2.1\0"),)
    return bytes(128) + b"DICM" + explicit(elements=meta) + explicit()


DICOMS = {
    "part 10": part10(),
    "preamble of a TIFF": b"II*\0" + bytes(124) + part10()[128:],
    "explicit": explicit(),
    "meta without preamble": part10()[132:],
    "big-endian": explicit(">"),
    "implicit": implicit(group_length=False),
    "ACR-NEMA": implicit(),
    "gzip": gzip.compress(part10(), mtime=0),
    "gzip, no preamble": gzip.compress(implicit(), mtime=0),
}

NO_DICOM = {
    "text": b"no volume at all, just a text" * 40,
    "zeros": b"\x08" + bytes(2000),
    "counts": struct.pack("<1000h", *range(8, 1008)),
    "voxels": struct.pack("<1000h", *([8] * 1000)),
    "one element": struct.pack("<HHI", 8, 0, 4) + bytes(4) + b"\xff" * 900,
    "gzip": gzip.compress(b"text" * 500, mtime=0),
    "bz2": bz2.compress(b"text" * 500),
}
