"""Feedback events: what is journalled of one act of the user, and its limits."""

from __future__ import annotations

import json
import math
import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np

__all__ = ["ERASED", "TEACH", "Event", "is_uid", "latest"]

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


def _shallow(value: Any, depth: int) -> bool:
    if isinstance(value, Mapping):
        return depth > 0 and all(_shallow(each, depth - 1) for each in value.values())
    if isinstance(value, list | tuple):
        return depth > 0 and all(_shallow(each, depth - 1) for each in value)
    return True


def _short(value: object) -> str:
    text = repr(value) if not isinstance(value, str) else repr(value[:60])
    return text if len(text) <= 64 else text[:60] + "..."
