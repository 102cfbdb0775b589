"""Journals with something in them, and what can happen to their bytes."""

from __future__ import annotations

import random
from pathlib import Path
from typing import Any

import numpy as np

from enn_core.lessons.journal import Journal

IDENTITY = {"app": "test", "dim": 4}


def header() -> tuple[dict[str, Any], dict[str, np.ndarray]]:
    return {"rule": 1}, {"anchors": np.eye(4, dtype=np.float16)}


def make(file: Path, lessons: int = 12, rows: int = 6) -> Path:
    """A journal of some lessons; the fourth is undone."""
    rng = np.random.default_rng(0)
    with Journal.open(file, identity=IDENTITY, header=header) as journal:
        for i in range(lessons):
            arrays = {"c": rng.normal(size=(rows, 4)).astype(np.float16)}
            with journal.writing() as writing:
                writing.append("teach", f"subject {i}", {"good": [i, i + 1]}, arrays)
        with journal.writing() as writing:
            writing.deactivate([4])
    return file


def state(journal: Journal) -> tuple[Any, ...]:
    """All that a journal says, to compare."""
    details, arrays = journal.header
    events = [
        (
            e.seq,
            e.uid,
            e.at,
            e.kind,
            e.subject,
            repr(e.details),
            _bits(e.arrays),
            e.covers,
            e.active,
        )
        for e in journal.events(active=None)
    ]
    return details, _bits(arrays), events


def _bits(arrays: dict[str, np.ndarray]) -> dict[str, tuple]:
    return {name: (a.dtype.str, a.shape, a.tobytes()) for name, a in arrays.items()}


def flipped(data: bytes, seed: int) -> bytes:
    """One to three bits are others."""
    rng, changed = random.Random(seed), bytearray(data)
    for _ in range(rng.choice([1, 1, 2, 3])):
        changed[rng.randrange(len(changed))] ^= 1 << rng.randrange(8)
    return bytes(changed)


def zeroed(data: bytes, page: int) -> bytes:
    """A page of 4 kB is zeros."""
    return data[: 4096 * page] + bytes(4096) + data[4096 * (page + 1) :]
