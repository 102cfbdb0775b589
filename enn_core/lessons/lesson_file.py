"""The lesson file: a journal as one JSON file, and back.

    {"format": "enn-feedback", "version": 1, "identity": {...}, "header": {...}, "events": [
      {"seq": 1, "uid": "...", "at": 1.7e9, "kind": "teach", "subject": "...", "details": {...},
       "covers": [1], "active": true,
       "arrays": {"c": {"dtype": "float16", "shape": [384], "data": "<base64, little endian>"}}}],
     "sha256": "<of all the rest>"}

Files come from strangers: everything in them is checked against the limits of `events` before
anything is stored, and nothing is stored unless all of it can be.
"""

from __future__ import annotations

import base64
import contextlib
import json
import math
import os
import stat
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from enn_core.files.atomic import clear_strays, own_name, sync_folder
from enn_core.files.digests import DigestError, check_seal, sealed
from enn_core.files.migrations import Content, FormatError, upgraded
from enn_core.lessons.errors import JournalCorrupt, JournalError, check_identity
from enn_core.lessons.events import (
    DTYPES,
    ERASED,
    MAX_ARRAY_BYTES,
    MAX_COVERS,
    Event,
    check_texts,
    pack_arrays,
    pack_json,
)
from enn_core.lessons.journal_file import own_files

__all__ = ["read_lessons", "write_lessons"]

FORMAT: Content = Content()
"""Steps from older files' JSON, read whole, to today's; the app is in the identity."""
_KIND = "enn-feedback"
# Lessons on brains are a megabyte each, and a site may teach hundreds of them.
MAX_BYTES = 512 * 2**20
# Small values take far more memory than text: two million of them some 200 MB.
MAX_VALUES = 2_000_000


def write_lessons(
    path: str | os.PathLike[str],
    journal: Path,
    identity: Mapping[str, Any],
    header: Mapping[str, Any],
    events: Sequence[Event],
) -> int:
    """Write events, undone ones too, and the header's JSON object; see `Journal.export`.

    What is left of erased ones stays behind.

    Args:
        path: the file; one that is there is replaced once the new one is complete on the disk.
        journal: the journal's own file, which is never replaced.
        identity: what the journal belongs to.
        header: of the journal.
        events: of the journal.

    Returns:
        How many were written.

    Raises:
        JournalError: if it cannot be written, or would be larger than `read_lessons` reads.
    """
    events = [event for event in events if event.kind != ERASED]
    content: dict[str, Any] = {
        "format": _KIND,
        "version": FORMAT.number,
        "identity": identity,
        "header": header,
        "events": [_as_json(event) for event in events],
    }
    data = json.dumps(sealed(content), allow_nan=False).encode()
    if len(data) > MAX_BYTES or _values(data) > MAX_VALUES:
        raise JournalError(
            f"the export would be too large to be read again ({len(data):,} bytes, at most "
            f"{MAX_BYTES:,}); forget something first"
        )
    try:
        target = Path(os.path.realpath(path))
        if _is_part(journal, target):
            raise JournalError(f"{str(path)!r} is the profile itself; export to another file")
        if target.exists() and not target.is_file():
            raise JournalError(f"{str(target)!r} is no file; export to another one")
        _replace(target, data)
    except (OSError, ValueError) as error:  # ValueError: a NUL in the name
        reason = getattr(error, "strerror", None) or error
        raise JournalError(
            f"cannot export to {str(path)!r}: {reason}; choose another file"
        ) from None
    return len(events)


def read_lessons(
    path: str | os.PathLike[str], journal: Path, identity: Mapping[str, Any], dim: int | None
) -> tuple[dict[str, Any], list[Event]]:
    """Header and events of an export, by their numbers; see `Journal.import_`.

    Args:
        path: a file that `write_lessons` wrote, or that someone says it did.
        journal: the journal's own file, which is never opened.
        identity: what the lessons must belong to.
        dim: length of the events' rows, None for any.

    Raises:
        JournalMismatch: if it belongs to something else.
        JournalCorrupt: if the file is no export, damaged, or beyond the limits.
        JournalError: if it cannot be read.
    """
    name = str(path)
    if "\0" not in name and _is_part(journal, Path(os.path.realpath(name))):
        raise JournalError(f"{name!r} is the profile itself; import an export of another one")
    content = _parse(_read(name), name)
    if content.get("format") != _KIND:
        raise _refused(name, "it is no export of feedback")
    try:
        check_seal(content)
    except DigestError as error:
        raise _refused(name, f"it {error}") from None
    except RecursionError:
        raise _refused(name, "it is nested too deeply") from None
    try:
        content = upgraded(content, content.get("version"), FORMAT)
    except FormatError as error:
        raise _refused(name, f"it {error}") from None
    belongs, header = content.get("identity"), content.get("header")
    if not isinstance(belongs, dict) or not isinstance(header, dict):
        raise _refused(name, "it does not say what it belongs to")
    check_identity(name, belongs, dict(identity))
    try:
        pack_json(header, "header")
    except ValueError as error:
        raise _refused(name, str(error)) from None
    entries = content.get("events")
    if not isinstance(entries, list):
        raise _refused(name, "it has no list of events")
    events: list[Event] = []
    for i, entry in enumerate(entries):
        try:
            events.append(_as_event(entry, dim))
        except ValueError as error:
            raise _refused(name, f"event {i + 1}: {error}") from None
    events.sort(key=lambda event: event.seq)
    for values in ({event.seq for event in events}, {event.uid for event in events}):
        if len(values) < len(events):
            raise _refused(name, "two of its events are the same")
    # Version 0.1 exports what is left of erased ones, too.
    return header, [event for event in events if event.kind != ERASED]


def _as_json(event: Event) -> dict[str, Any]:
    arrays = {}
    for name, values in event.arrays.items():
        little = np.ascontiguousarray(values, values.dtype.newbyteorder("<"))
        arrays[name] = {
            "dtype": values.dtype.name,
            "shape": list(values.shape),
            "data": base64.b64encode(little.tobytes()).decode(),
        }
    return {
        "seq": event.seq,
        "uid": event.uid,
        "at": event.at,
        "kind": event.kind,
        "subject": event.subject,
        "details": event.details,
        "covers": list(event.covers),
        "active": event.active,
        "arrays": arrays,
    }


def _as_event(entry: Any, dim: int | None) -> Event:
    """An event of a file; ValueError unless it could have been appended."""
    fields = ("seq", "uid", "at", "kind", "subject", "details", "covers", "active", "arrays")
    if not isinstance(entry, dict) or not all(field in entry for field in fields):
        raise ValueError(f"it needs the fields {', '.join(fields)}")
    seq, uid, at, kind, subject, details, covers, active, arrays = (entry[key] for key in fields)
    check_texts(uid, at, kind, subject)
    if not _is_seq(seq):
        raise ValueError("seq must be a whole number, 1 to 2^63 - 1")
    if not isinstance(covers, list) or len(covers) > MAX_COVERS:
        raise ValueError(f"covers must be a list of at most {MAX_COVERS:,} numbers")
    if not all(_is_seq(each) or each == 0 for each in covers):
        raise ValueError("covers must be whole numbers, 0 to 2^63 - 1")
    if not isinstance(active, bool) or not isinstance(arrays, dict):
        raise ValueError("active must be true or false, and arrays an object")
    pack_json(details, "details")
    values = {name: _as_array(array) for name, array in arrays.items()}
    pack_arrays(values, dim)
    covered = tuple(sorted(set(covers)))
    return Event(seq, uid, float(at), kind, subject, details, values, covered, active)


def _as_array(array: Any) -> np.ndarray:
    if not isinstance(array, Mapping):
        raise ValueError("an array must be an object")
    dtype, shape, data = (array.get(key) for key in ("dtype", "shape", "data"))
    if dtype not in DTYPES or not isinstance(data, str):
        raise ValueError(f"array must be base64 of {' or '.join(DTYPES)}")
    if not isinstance(shape, list) or not 1 <= len(shape) <= 4:
        raise ValueError("shape of an array must list 1 to 4 lengths")
    if not all(type(each) is int and 0 <= each <= MAX_ARRAY_BYTES for each in shape):
        raise ValueError("shape of an array must hold whole numbers")
    kind = np.dtype(dtype).newbyteorder("<")
    raw = base64.b64decode(data, validate=True)
    if math.prod(shape) * kind.itemsize != len(raw):
        raise ValueError(f"an array of shape {shape} has {len(raw)} bytes")
    return np.frombuffer(raw, kind).reshape(shape).astype(kind.newbyteorder("="))


def _is_seq(value: Any) -> bool:
    return type(value) is int and 1 <= value < 2**63


def _is_part(journal: Path, file: Path) -> bool:
    """Whether a resolved path is one of the journal's files, which must not even be opened."""
    own = os.path.realpath(journal)
    return file in own_files(Path(own))


def _read(name: str) -> bytes:
    try:
        info = os.stat(name)
        if not stat.S_ISREG(info.st_mode):  # a pipe could wait, or never end
            raise JournalError(f"cannot import {name!r}: it is no file; give the path of an export")
        if info.st_size > MAX_BYTES:
            raise _refused(name, f"it is larger than {MAX_BYTES:,} bytes")
        with open(name, "rb") as file:
            data = file.read(MAX_BYTES + 1)
    except (OSError, ValueError) as error:
        reason = getattr(error, "strerror", None) or error
        raise JournalError(f"cannot import {name!r}: {reason}; give another file") from None
    if len(data) > MAX_BYTES:
        raise _refused(name, f"it is larger than {MAX_BYTES:,} bytes")
    return data


def _parse(data: bytes, name: str) -> dict[str, Any]:
    if _values(data) > MAX_VALUES:
        raise _refused(name, f"it holds more than {MAX_VALUES:,} values")
    try:
        content = json.loads(data.decode(), parse_constant=_no_constant)
    except RecursionError:
        raise _refused(name, "it is nested too deeply") from None
    except ValueError as error:  # neither text nor JSON, or a number of thousands of digits
        raise _refused(name, str(error).partition("\n")[0][:100]) from None
    if not isinstance(content, dict):
        raise _refused(name, "it is no export of feedback")
    return content


def _no_constant(name: str) -> float:
    raise ValueError(f"{name} is no number of JSON")


def _values(data: bytes) -> int:
    """An upper bound of the number of values in JSON."""
    return sum(data.count(mark) for mark in (b",", b"[", b"{", b":"))


def _refused(name: str, why: str) -> JournalCorrupt:
    return JournalCorrupt(f"cannot import {name!r}: {why}; nothing was imported")


def _replace(target: Path, data: bytes) -> None:
    """Write a file, readable by its owner only: whoever looks finds the old one or all of this."""
    begin = f".{target.name[:80]}"
    clear_strays(target.parent, f"{begin}.")
    temporary = target.parent / own_name(begin)
    descriptor = os.open(temporary, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600)
    try:
        with open(descriptor, "wb") as file:
            file.write(data)
            file.flush()
            os.fsync(file.fileno())
        os.replace(temporary, target)
    except BaseException:
        with contextlib.suppress(OSError):
            os.unlink(temporary)
        raise
    sync_folder(target.parent)
