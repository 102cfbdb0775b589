"""What was looked into and is no picture, so that an update does not open it again."""

from __future__ import annotations

import contextlib
import hashlib
import os
import time
from pathlib import Path

import PIL

from enn_core.files.atomic import replacing
from retrieval.formats import FORMATS
from retrieval.images import FoundFile, is_picture

__all__ = ["Others"]

FILE_NAME = "others.bin"
"""A cache in the index directory: a key, then the digests of files, 8 bytes each."""

_BYTES = 8
# A file changed this shortly ago (ns) may change again without a new time.
_FRESH_NS = 2_000_000_000


class Others:
    """Files that are no pictures, by path, size and time.

    Args:
        folder: the index directory.
        root: the photo folder.
    """

    def __init__(self, folder: Path, root: Path) -> None:
        self._file = folder / FILE_NAME
        self._root = root
        self._seen: set[bytes] = set()
        # What is a picture is another question with other formats, and in another folder.
        form = [(form.name, form.begins.pattern) for form in FORMATS]
        self._key = _digest(repr((PIL.__version__, form)), os.fspath(root))
        self._known = self._read()

    def _read(self) -> frozenset[bytes]:
        data = b""
        with contextlib.suppress(OSError):
            data = self._file.read_bytes()
        if data[:_BYTES] != self._key:
            return frozenset()
        return frozenset(data[at : at + _BYTES] for at in range(_BYTES, len(data), _BYTES))

    def hold(self, file: FoundFile) -> bool:
        """Whether a file of a scan is no picture; it is opened unless that is known."""
        digest = _digest(file.path, f"{file.size} {file.mtime_ns}")
        if digest not in self._known and is_picture(self._root / file.path):
            return False
        if digest in self._known or abs(time.time_ns() - file.mtime_ns) > _FRESH_NS:
            self._seen.add(digest)
        return True

    def save(self) -> None:
        """Remember what this scan came across; without space for it the next one looks again."""
        if self._seen != self._known:
            with contextlib.suppress(OSError), replacing(self._file) as new:
                new.write_bytes(self._key + b"".join(sorted(self._seen)))


def _digest(*parts: str) -> bytes:
    text = "\0".join(parts).encode("utf-8", "surrogateescape")
    return hashlib.blake2b(text, digest_size=_BYTES).digest()
