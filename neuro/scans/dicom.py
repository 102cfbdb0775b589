"""Telling DICOM, which is not read here, from what is: by content, and by name where that fails.

>>> called_dicom("IM0001.dcm.gz"), called_dicom("sub-01_T1w.nii.gz")
(True, False)
"""

from __future__ import annotations

import os
import re
import struct
import zlib
from pathlib import Path

__all__ = ["DICOM_ADVICE", "called_dicom", "dicom_problem", "holds_dicom", "is_dicom"]

DICOM_ADVICE = (
    "convert the series to NIfTI first (for example with dcm2niix -z y -o OUT FOLDER) and give that"
)

_NAMES = re.compile(r"DICOMDIR|.*\.(dcm|ima|dicom|dic)(\.(gz|bz2|xz|zst|z))?", re.IGNORECASE)
# Files of a folder that are looked into before it is taken to hold no DICOM.
_LOOKS = 2000
# Bytes read of a file, and of those that they unpack to.
_READ, _HEAD = 4096, 1024
_GZIP = b"\x1f\x8b"
_GZIP_STREAM = 31

# Types of values, as they stand in files; after the second row the length takes six bytes.
_SHORT = b"AE AS AT CS DA DS DT FD FL IS LO LT PN SH SL SS ST TM UI UL US".split()
_LONG = b"OB OD OF OL OV OW SQ SV UC UN UR UT UV".split()
# Groups that a file without preamble begins with: of the file, and of the study.
_FIRST = {0x0002, 0x0008}
_UNDEFINED = 0xFFFFFFFF
# Bytes of one value among the first: names, dates, codes, and an icon at most.
_MAX_VALUE = 2**20
# Elements in a row that are no accident.
_ENOUGH = 3


def called_dicom(name: str) -> bool:
    """Whether a file of this name should be DICOM."""
    return _NAMES.fullmatch(name) is not None


def dicom_problem(content: bytes, name: str = "") -> str:
    """Why a file is refused as DICOM, and what to do; "" if it is none.

    Args:
        content: its first bytes, a kilobyte or more.
        name: of the file; counts too if it is given.
    """
    packed = content[:2] == _GZIP
    if _has_dicom(_unpacked(content)):
        what = "is a DICOM file"
    elif called_dicom(name):
        what = "is called as a DICOM file"
    else:
        return ""
    return (
        f"{what}, in gzip; gunzip all of them, then {DICOM_ADVICE}"
        if packed
        else (f"{what}; {DICOM_ADVICE}")
    )


def is_dicom(path: str | os.PathLike[str]) -> bool:
    """Whether a file is DICOM by its content; what cannot be read is none."""
    try:
        if not os.path.isfile(path):
            return False
        with open(path, "rb") as file:
            return _has_dicom(_unpacked(file.read(_READ)))
    except OSError:
        return False


def holds_dicom(folder: Path) -> bool:
    """Whether a file in this folder or below it is DICOM, by its content or its name."""
    looked = 0
    for place, folders, files in os.walk(folder):
        folders.sort()
        for name in sorted(files):
            if called_dicom(name) or is_dicom(os.path.join(place, name)):
                return True
            looked += 1
            if looked >= _LOOKS:
                return False
    return False


def _unpacked(content: bytes) -> bytes:
    """The first bytes, unpacked if they are gzip, as far as that goes."""
    if content[:2] != _GZIP:
        return content[:_HEAD]
    try:
        return zlib.decompressobj(_GZIP_STREAM).decompress(content[:_READ], _HEAD)
    except zlib.error:
        return b""


def _has_dicom(head: bytes) -> bool:
    return head[128:132] == b"DICM" or any(_has_elements(head, order) for order in "<>")


def _has_elements(head: bytes, order: str) -> bool:
    """Whether a data set begins here: elements in order, each with a length that it can have."""
    at = found = last = 0
    while len(head) >= at + 8:
        group, number = struct.unpack_from(order + "HH", head, at)
        tag, kind = group << 16 | number, head[at + 4 : at + 6]
        if (not found and group not in _FIRST) or (found and tag <= last):
            return False
        if kind in _SHORT:
            (size,), begin = struct.unpack_from(order + "H", head, at + 6), at + 8
        elif kind in _LONG and len(head) >= at + 12:
            (size,), begin = struct.unpack_from(order + "I", head, at + 8), at + 12
        else:
            (size,), begin = struct.unpack_from(order + "I", head, at + 4), at + 8
        if number == 0 and size != 4:  # the length of the group
            return False
        if size == _UNDEFINED:  # a sequence of items
            return head[begin : begin + 4] == struct.pack(order + "HH", 0xFFFE, 0xE000)
        if size % 2 or size > _MAX_VALUE:
            return False
        found, last, at = found + 1, tag, begin + size
        if found >= _ENOUGH:
            return True
    return False
