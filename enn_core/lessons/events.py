"""Feedback events: what is journalled of one act of the user, its limits, and its row on disk.

A row carries the CRC-32 of its other columns, and a line beside the rows says which there are: so
what was changed or lost on the disk is known, and named by its number.
"""

from __future__ import annotations

import bisect
import json
import math
import re
import zlib
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from enn_core.lessons.errors import JournalCorrupt

__all__ = ["ERASED", "TEACH", "DamagedEntry", "Event", "is_uid", "latest"]

SET_ASIDE = "forget it, or let `enn check --repair` set it aside"
"""What to do with a damaged entry."""

TEACH = "teach"
"""Kind of the events that the user made by marking; any other kind is bookkeeping."""
ERASED = "erased"
"""Kind of what is left of an erased lesson: its uid alone, so that a page that never heard of the
answer does not teach it again. It is never active and never exported."""

MAX_SUBJECT = 20_000  # characters
MAX_DETAILS = 2_000_000  # characters of JSON; 10,000 marks take 0.4 million
MAX_DEPTH = 16
DTYPES = ("float16", "float32")
MAX_ARRAYS = 8
MAX_ARRAY_BYTES = 32 * 2**20  # of one event; 10,000 float16 rows of 1,024 take 20 million
MAX_COVERS = 100_000
LAST_SECOND = 253_402_300_799  # 9999-12-31, the end of the calendar that Python knows

_NAME = re.compile(r"[a-z][a-z0-9_]{0,31}")


@dataclass(frozen=True, eq=False)
class Event:
    """One entry of a journal.

    Attributes:
        seq: its number in this journal, ascending from 1; never used twice.
        uid: 32 hex digits; the same in every journal it is imported into.
        at: when, in seconds since 1970.
        kind: "teach", or a kind of bookkeeping.
        subject: what was taught about.
        details: JSON object.
        arrays: numbers the update needs, float16 or float32, read-only.
        covers: the seq of the "teach" events that it was computed from, ascending; a "teach" event
            covers itself.
        active: False once undone.
    """

    seq: int
    uid: str
    at: float
    kind: str
    subject: str
    details: dict[str, Any]
    arrays: dict[str, np.ndarray]
    covers: tuple[int, ...]
    active: bool


@dataclass(frozen=True)
class DamagedEntry:
    """An entry whose row is not what was written.

    Attributes:
        seq: its number.
        subject: as it reads now, if it reads as a text; "" if not. It may be what is damaged.
        why: what is wrong, for a bracket.
    """

    seq: int
    subject: str
    why: str


def latest(events: Iterable[Event]) -> dict[str, Event]:
    """The event that now stands for each subject.

    That is, of its active events, the newest that covers exactly its active "teach" events. A
    subject without one (an earlier teach was undone, or another journal was imported) is left out
    until an event that covers them is appended.

    Args:
        events: of one journal, in any order; inactive ones do not count.

    Returns:
        By subject, in the order of the subjects' first active "teach" events.
    """
    ordered = sorted((event for event in events if event.active), key=lambda event: event.seq)
    taught: dict[str, set[int]] = {}
    for event in ordered:
        if event.kind == TEACH:
            taught.setdefault(event.subject, set()).add(event.seq)
    found = {
        event.subject: event for event in ordered if set(event.covers) == taught.get(event.subject)
    }
    return {subject: found[subject] for subject in taught if subject in found}


# --- what may be stored, by an append as by an import --------------------------------------------


def is_uid(value: object) -> bool:
    """Whether an event may be known by it: 32 hex digits, in lower case."""
    return isinstance(value, str) and re.fullmatch(r"[0-9a-f]{32}", value) is not None


def check_texts(uid: str, at: float, kind: str, subject: str) -> None:
    """Raise ValueError unless the plain fields of an event are within their limits."""
    if not is_uid(uid):
        raise ValueError(f"uid must be 32 hex digits, got {_short(uid)}")
    if isinstance(at, bool) or not isinstance(at, int | float) or not 0 <= at <= LAST_SECOND:
        raise ValueError(f"at must be seconds since 1970, 0 to {LAST_SECOND}, got {_short(at)}")
    if not isinstance(kind, str) or not _NAME.fullmatch(kind):
        raise ValueError(f"kind must be a lower-case word of up to 32 letters, got {_short(kind)}")
    if not isinstance(subject, str) or len(subject) > MAX_SUBJECT:
        raise ValueError(f"subject must be a text of up to {MAX_SUBJECT:,} characters")
    try:
        subject.encode()
    except UnicodeEncodeError:
        raise ValueError("subject holds half a character (a lone surrogate); remove it") from None


def pack_json(value: Any, name: str) -> str:
    """A JSON object as text.

    Raises:
        ValueError: if it is no object, too large, too deep, or holds what JSON cannot.
    """
    if not isinstance(value, Mapping):
        raise ValueError(f"{name} must be a JSON object, got {type(value).__name__}")
    if not _shallow(value, MAX_DEPTH):
        raise ValueError(f"{name} is nested deeper than {MAX_DEPTH} levels")
    try:
        text = json.dumps(dict(value), allow_nan=False, separators=(",", ":"))
    except (TypeError, ValueError) as error:
        raise ValueError(f"{name} cannot be stored as JSON: {error}") from None
    if len(text) > MAX_DETAILS:
        raise ValueError(f"{name} is {len(text):,} characters of JSON; at most {MAX_DETAILS:,}")
    return text


def pack_arrays(arrays: Mapping[str, np.ndarray] | None, dim: int | None) -> tuple[str, bytes]:
    """Arrays as a JSON list of [name, dtype, shape] and their little-endian bytes, by name.

    Args:
        arrays: float16 or float32, 1 to 4 axes.
        dim: what the last axis must be; None for any.

    Raises:
        ValueError: if one is too large, not finite, or of another type or shape.
    """
    layout, parts = [], []
    for name, array in sorted((arrays or {}).items()):
        if not isinstance(name, str) or not _NAME.fullmatch(name):
            raise ValueError(f"array names are lower-case words, got {_short(name)}")
        values = np.asarray(array)
        if values.dtype.name not in DTYPES:
            raise ValueError(f"array {name} must be float16 or float32, got {values.dtype}")
        if not 1 <= values.ndim <= 4 or (dim is not None and values.shape[-1] != dim):
            wanted = "1 to 4 axes" if dim is None else f"1 to 4 axes, the last of {dim}"
            raise ValueError(f"array {name} must have {wanted}; its shape is {values.shape}")
        if not np.isfinite(values).all():
            raise ValueError(f"array {name} holds NaN or infinity")
        layout.append([name, values.dtype.name, list(values.shape)])
        parts.append(np.ascontiguousarray(values, values.dtype.newbyteorder("<")).tobytes())
    if len(layout) > MAX_ARRAYS:
        raise ValueError(f"{len(layout)} arrays in one event; at most {MAX_ARRAYS}")
    data = b"".join(parts)
    if len(data) > MAX_ARRAY_BYTES:
        raise ValueError(f"{len(data):,} bytes of arrays in one event; at most {MAX_ARRAY_BYTES:,}")
    return json.dumps(layout, separators=(",", ":")), data


def unpack_arrays(layout: str, data: bytes) -> dict[str, np.ndarray]:
    """The inverse of `pack_arrays`; ValueError if the bytes do not fit."""
    arrays, start = {}, 0
    for name, dtype, shape in json.loads(layout):
        kind = np.dtype(dtype).newbyteorder("<")
        count = math.prod(shape)
        values = np.frombuffer(data, kind, count, start).reshape(shape)
        start += values.nbytes
        arrays[name] = values.astype(kind.newbyteorder("="), copy=False)
        arrays[name].flags.writeable = False
    if start != len(data):
        raise ValueError("bytes are left over")
    return arrays


# --- rows ----------------------------------------------------------------------------------------

COLUMNS = "seq, uid, at, kind, subject, active, covers, details, layout, data, crc"
"""Of an event, in the order of a row here."""


def row_of(
    seq: int,
    uid: str,
    at: float,
    kind: str,
    subject: str,
    active: bool,
    covers: Iterable[int],
    details: Mapping[str, Any],
    arrays: Mapping[str, np.ndarray] | None,
    dim: int | None,
) -> tuple:
    """The row of an event.

    Raises:
        ValueError: if a value is outside of its limits.
    """
    check_texts(uid, at, kind, subject)
    text, (layout, data) = pack_json(details, "details"), pack_arrays(arrays, dim)
    covered = {int(each) for each in covers} | ({seq} if kind == TEACH else set())
    of = json.dumps(sorted(covered), separators=(",", ":"))
    return _summed((seq, uid, float(at), kind, subject, int(active), of, text, layout, data))


def switched(row: Sequence, active: bool) -> tuple:
    """A whole row, with its event undone or taken back."""
    return _summed((*row[:5], int(active), *row[6:10]))


def stripped(row: Sequence) -> tuple:
    """What is left of a whole row when its event is erased."""
    return _summed((row[0], row[1], 0.0, ERASED, "", 0, "[]", "{}", "[]", b""))


def row_crc(row: Sequence) -> int:
    """Checksum of a row's columns but the last; -1 if one is of a type that none can have."""
    try:
        seq, uid, at, kind, subject, active, covers, details, layout, data = row[:10]
        texts = json.dumps([seq, uid, float(at), kind, subject, active, covers, details, layout])
        return zlib.crc32(data, zlib.crc32(texts.encode()))
    except (TypeError, ValueError):
        return -1


def is_whole(row: Sequence) -> bool:
    """Whether a row is as it was written."""
    return row[10] == row_crc(row)


def intact(
    rows: Iterable[Sequence], line: Any, active: bool | None
) -> tuple[list[Event], list[DamagedEntry]]:
    """The events of rows, and what is damaged or lost.

    Args:
        rows: all that a journal has, by seq.
        line: that says which there are, `Entries`.
        active: which events; None for all. What is damaged may be either.

    Raises:
        JournalCorrupt: if the line itself is damaged.
    """
    missing = set(Entries.read(line))
    events: list[Event] = []
    damaged: list[DamagedEntry] = []
    for row in rows:
        try:
            if not is_whole(row):
                raise ValueError("its checksum does not fit")
            if row[0] not in missing:
                raise ValueError("it was not there, or is there twice")
            if active is None or active == bool(row[5]):
                events.append(event_of(row))
        except (ValueError, TypeError) as error:
            subject = row[4] if isinstance(row[4], str) else ""
            damaged.append(DamagedEntry(row[0], subject, str(error)))
        missing.discard(row[0])
    damaged += [DamagedEntry(seq, "", "it cannot be found") for seq in sorted(missing)]
    return events, damaged


def events_of(rows: Iterable[Sequence], line: Any, active: bool | None) -> list[Event]:
    """As `intact`.

    Raises:
        JournalCorrupt: names the first entry that is damaged.
    """
    events, damaged = intact(rows, line, active)
    for each in damaged:
        raise JournalCorrupt(f"entry {each.seq} is damaged ({each.why}); {SET_ASIDE}")
    return events


class Entries:
    """Which entries a journal has, and the highest number that one ever had.

    >>> held = Entries()
    >>> for seq in range(1, 8):
    ...     held.add(seq)
    >>> for seq in (4, 5, 7):
    ...     held.discard(seq)
    >>> held.line(), 5 in held, 6 in held
    ('231ae769 7 1-3,6-6', False, True)
    >>> list(Entries.read(held.line()))
    [1, 2, 3, 6]
    """

    def __init__(self) -> None:
        self.last = 0
        self._ranges: list[tuple[int, int]] = []  # ascending; first and last of each

    @classmethod
    def read(cls, line: Any) -> Entries:
        """From a line.

        Raises:
            JournalCorrupt: if it is damaged.
        """
        crc, _, text = line.partition(" ") if isinstance(line, str) else ("", "", "")
        if crc != f"{zlib.crc32(text.encode('utf-8', 'surrogateescape')):08x}":
            raise JournalCorrupt(
                "the journal's list of entries is damaged; `enn check --repair` makes it again"
            )
        last, _, ranges = text.partition(" ")
        entries = cls()
        entries.last = int(last)
        for each in filter(None, ranges.split(",")):
            first, _, end = each.partition("-")
            entries._ranges.append((int(first), int(end)))
        return entries

    def line(self) -> str:
        """As a line: its checksum, the highest number, ranges."""
        text = f"{self.last} {','.join(f'{first}-{end}' for first, end in self._ranges)}"
        return f"{zlib.crc32(text.encode()):08x} {text}"

    def __iter__(self) -> Iterator[int]:
        for first, end in self._ranges:
            yield from range(first, end + 1)

    def __contains__(self, seq: int) -> bool:
        i = self._index(seq)
        return i >= 0 and seq <= self._ranges[i][1]

    def add(self, seq: int) -> None:
        """Note a new entry; its number is above all others."""
        if self._ranges and self._ranges[-1][1] == seq - 1:
            self._ranges[-1] = (self._ranges[-1][0], seq)
        else:
            self._ranges.append((seq, seq))
        self.last = seq

    def discard(self, seq: int) -> None:
        """Note that an entry is gone, if it was there."""
        if seq in self:
            i = self._index(seq)
            first, end = self._ranges[i]
            halves = ((first, seq - 1), (seq + 1, end))
            self._ranges[i : i + 1] = [(a, b) for a, b in halves if a <= b]

    def _index(self, seq: int) -> int:
        """Of the range that has it, if any has."""
        return bisect.bisect_right(self._ranges, seq, key=lambda each: each[0]) - 1


def _summed(row: tuple) -> tuple:
    return (*row, row_crc(row))


def event_of(row: Sequence) -> Event:
    seq, uid, at, kind, subject, active, covers, details, layout, data, _ = row
    return Event(
        seq=seq,
        uid=uid,
        at=at,
        kind=kind,
        subject=subject,
        details=json.loads(details),
        arrays=unpack_arrays(layout, data),
        covers=tuple(json.loads(covers)),
        active=bool(active),
    )


def _shallow(value: Any, depth: int) -> bool:
    if isinstance(value, Mapping):
        return depth > 0 and all(_shallow(each, depth - 1) for each in value.values())
    if isinstance(value, list | tuple):
        return depth > 0 and all(_shallow(each, depth - 1) for each in value)
    return True


def _short(value: object) -> str:
    text = repr(value) if not isinstance(value, str) else repr(value[:60])
    return text if len(text) <= 64 else text[:60] + "..."
