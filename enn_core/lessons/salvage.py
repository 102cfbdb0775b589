"""Rows of a journal whose pages SQLite cannot reach any more.

A page that points to others, or the first one, may be damaged: what lies on the others is still
there. This looks at every page for itself, as https://www.sqlite.org/fileformat2.html has them;
whatever it takes for a row proves to be one by its checksum.
"""

from __future__ import annotations

import contextlib
import json
import struct
from collections.abc import Iterator
from typing import Any

from enn_core.lessons.errors import JournalCorrupt
from enn_core.lessons.events import Entries, is_whole
from enn_core.lessons.journal_file import SEALED, crc_of

__all__ = ["salvage"]

_LEAF = 0x0D  # first byte of a page of a table's rows
_COLUMNS = 11  # of an event
_NUMBERS = {1: 1, 2: 2, 3: 3, 4: 4, 5: 6, 6: 8}  # bytes of a whole number, by its type


def salvage(data: bytes) -> tuple[dict[int, tuple], dict[str, Any]]:
    """What a file's pages hold, each looked at alone.

    Args:
        data: of the whole file.

    Returns:
        Rows of events by number, and values of `meta`, that are whole. Of what is there in more
        than one version nobody knows which one holds: it is left out.
    """
    rows: dict[int, set[tuple]] = {}
    meta: dict[str, set[Any]] = {}
    for rowid, values in _records(data):
        if len(values) == _COLUMNS and is_whole(row := (rowid, *values[1:])):
            rows.setdefault(rowid, set()).add(row)
        elif len(values) == 2 and isinstance(values[0], str):
            meta.setdefault(values[0], set()).add(values[1])
    only = {key: next(iter(values)) for key, values in meta.items() if len(values) == 1}
    described: dict[str, Any] = {}
    for key in SEALED:
        with contextlib.suppress(KeyError, ValueError, TypeError):
            if json.loads(only["crc"])[key] == crc_of(only[key]):
                described[key] = only[key]
    with contextlib.suppress(JournalCorrupt):
        Entries.read(only.get("entries"))
        described["entries"] = only["entries"]
    if type(only.get("generation")) is int:
        described["generation"] = only["generation"]
    return {seq: next(iter(each)) for seq, each in rows.items() if len(each) == 1}, described


def _records(data: bytes) -> Iterator[tuple[int, list[Any]]]:
    """Rowid and values of all that looks like a row of a table."""
    size = int.from_bytes(data[16:18], "big")
    if size not in {2**n for n in range(9, 16)}:
        size = 4096
    for start in range(0, len(data), size):
        top = 100 if start == 0 else 0
        page = data[start : start + size]
        if len(page) < size or page[top] != _LEAF:
            continue
        count = int.from_bytes(page[top + 3 : top + 5], "big")
        for i in range(min(count, size // 4)):
            with contextlib.suppress(IndexError, ValueError, struct.error, OverflowError):
                where = int.from_bytes(page[top + 8 + 2 * i : top + 10 + 2 * i], "big")
                length, where = _varint(page, where)
                rowid, where = _varint(page, where)
                yield rowid, _values(_payload(data, page, where, length, size))


def _payload(data: bytes, page: bytes, where: int, length: int, size: int) -> bytes:
    """A row's bytes, of which the last may lie on other pages."""
    if not 0 <= length <= len(data):
        raise ValueError("longer than the file")
    most = size - 35
    here = length
    if length > most:
        least = (size - 12) * 32 // 255 - 23
        here = least + (length - least) % (size - 4)
        here = here if here <= most else least
    parts, left = [page[where : where + here]], length - here
    following = int.from_bytes(page[where + here : where + here + 4], "big")
    while left > 0:
        if not 1 < following <= len(data) // size:
            raise ValueError("no such page")
        start = (following - 1) * size
        parts.append(data[start + 4 : start + min(size, 4 + left)])
        following = int.from_bytes(data[start : start + 4], "big")
        left -= size - 4
    return b"".join(parts)


def _values(payload: bytes) -> list[Any]:
    end, where = _varint(payload, 0)
    kinds = []
    while where < end:
        kind, where = _varint(payload, where)
        kinds.append(kind)
    if where != end or len(kinds) > _COLUMNS:
        raise ValueError("no row of ours")
    values: list[Any] = []
    for kind in kinds:
        value, where = _value(payload, where, kind)
        values.append(value)
    if where != len(payload):
        raise ValueError("bytes are left over")
    return values


def _value(payload: bytes, where: int, kind: int) -> tuple[Any, int]:
    if kind == 0:
        return None, where
    if kind in (8, 9):
        return kind - 8, where
    if kind == 7:
        return struct.unpack_from(">d", payload, where)[0], where + 8
    if kind in _NUMBERS:
        end = where + _NUMBERS[kind]
        return int.from_bytes(payload[where:end], "big", signed=True), end
    if kind < 12:
        raise ValueError("no such type")
    end = where + (kind - 12) // 2
    raw = payload[where:end]
    return raw if kind % 2 == 0 else raw.decode("utf-8", "surrogateescape"), end


def _varint(data: bytes, where: int) -> tuple[int, int]:
    """A number of one to nine bytes, and where it ends."""
    number = 0
    for i in range(8):
        byte = data[where + i]
        number = number << 7 | byte & 0x7F
        if byte < 0x80:
            return number, where + i + 1
    return number << 8 | data[where + 8], where + 9
