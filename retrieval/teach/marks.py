"""What a user says about a query: these pictures are good answers, those are bad ones.

A mark names a picture by its id in the index and by a print of its content, so that a mark from
another index, or of a file that was replaced since, is never taken for one of the picture that now
has that id.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from operator import index as as_integer
from typing import TYPE_CHECKING, Any

import numpy as np
import numpy.typing as npt

if TYPE_CHECKING:
    from retrieval.index.eigen_index import EigenIndex, Entry

__all__ = [
    "BAD",
    "GOOD",
    "MOST_MARKS",
    "PRINT_CHARACTERS",
    "WITHDRAWN",
    "Found",
    "Mark",
    "TeachError",
    "checked_ids",
    "find",
    "known",
    "merge",
    "picture_print",
    "read_marks",
]

GOOD, BAD, WITHDRAWN = 1, -1, 0

MOST_MARKS = 10_000
"""Marks that one query may have."""

PRINT_CHARACTERS = 16
"""Hex digits that tell a picture's content from any other."""


class TeachError(ValueError):
    """Something that cannot be taught, undone or forgotten; one line, fit to show."""


@dataclass(frozen=True)
class Mark:
    """One mark.

    Attributes:
        id: the picture's id in the index where it was marked.
        print: of its content; empty for a withdrawal, which holds for every picture of that id.
        sign: 1 good, -1 bad, 0 withdrawn.
    """

    id: int
    print: str
    sign: int

    def as_json(self) -> list[Any]:
        return [self.id, self.print, self.sign]


@dataclass(frozen=True, eq=False)
class Found:
    """The marks of a query whose pictures are in an index.

    Attributes:
        good, bad: ids there.
        good_vectors, bad_vectors: (n, r) and (m, r) stored vectors.
        ignored: marked ids whose pictures are not there, with the reason.
    """

    good: tuple[int, ...]
    bad: tuple[int, ...]
    good_vectors: npt.NDArray[np.float32]
    bad_vectors: npt.NDArray[np.float32]
    ignored: dict[int, str]

    def __len__(self) -> int:
        return len(self.good) + len(self.bad)


def read_marks(details: Any) -> list[Mark]:
    """Marks from an event's details, which may have come from a stranger's file.

    Raises:
        ValueError: if they are no marks.
    """
    listed = details.get("marks") if isinstance(details, dict) else None
    if not isinstance(listed, list) or len(listed) > 3 * MOST_MARKS:
        raise ValueError("no list of marks")
    marks = []
    for item in listed:
        if not (isinstance(item, list) and len(item) == 3):
            raise ValueError("a mark is no [id, print, sign]")
        id_, print_, sign = item
        if type(id_) is not int or not 0 <= id_ < 2**63:
            raise ValueError("a marked id is out of range")
        if not isinstance(print_, str) or len(print_) > PRINT_CHARACTERS:
            raise ValueError("a print is no short text")
        if type(sign) is not int or sign not in (GOOD, BAD, WITHDRAWN):
            raise ValueError("a mark is neither good nor bad nor withdrawn")
        marks.append(Mark(id_, print_, sign))
    return marks


def merge(given: Iterable[Sequence[Mark]]) -> list[Mark]:
    """The marks that hold after several lessons on one query, in the order of first marking.

    A later mark of a picture replaces the earlier one.
    """
    held: dict[int, dict[str, Mark]] = {}
    for marks in given:
        for mark in marks:
            if mark.sign == WITHDRAWN:
                held.pop(mark.id, None)
            else:
                held.setdefault(mark.id, {})[mark.print] = mark
    return [mark for of_id in held.values() for mark in of_id.values()]


def checked_ids(
    good: Iterable[Any], bad: Iterable[Any], unmark: Iterable[Any]
) -> tuple[list[int], list[int], list[int]]:
    """The ids of one lesson, each once.

    Raises:
        TeachError: if there are none, one is no whole number, or one is named in two ways.
    """
    named = {"good": good, "bad": bad, "unmark": unmark}
    lists = {name: _integers(name, ids) for name, ids in named.items()}
    if not any(lists.values()):
        raise TeachError("nothing is marked; give ids of good or of bad pictures")
    if sum(map(len, lists.values())) > MOST_MARKS:
        raise TeachError(f"too many marks at once; at most {MOST_MARKS:,} are kept per query")
    for first, second in (("good", "bad"), ("good", "unmark"), ("bad", "unmark")):
        both = sorted(set(lists[first]) & set(lists[second]))
        if both:
            raise TeachError(f"{_some(both)} cannot be both {first} and {second}; decide for one")
    return lists["good"], lists["bad"], lists["unmark"]


def known(index: EigenIndex, ids: Sequence[int]) -> dict[int, str]:
    """Prints of searchable pictures by id.

    Raises:
        TeachError: naming those that are not in the index, or are there no longer.
    """
    entries = index.entries_of(ids)
    missing = [id_ for id_ in ids if id_ not in entries or entries[id_].state != "indexed"]
    if missing:
        raise TeachError(
            f"no searchable picture has the id {_some(missing)}; take ids from the results of a "
            "search in this index"
        )
    return {id_: picture_print(entries[id_]) for id_ in ids}


def find(index: EigenIndex, marks: Sequence[Mark]) -> Found:
    """Those of a query's marks whose pictures an index has."""
    entries = index.entries_of([mark.id for mark in marks])
    ignored: dict[int, str] = {}
    kept: list[Mark] = []
    for mark in marks:
        entry = entries.get(mark.id)
        if entry is not None and picture_print(entry) != mark.print:
            ignored[mark.id] = "another picture has this id here"
        elif entry is None or entry.state != "indexed":
            ignored[mark.id] = "the picture is not in this index"
        else:
            kept.append(mark)
    good = tuple(mark.id for mark in kept if mark.sign == GOOD)
    bad = tuple(mark.id for mark in kept if mark.sign == BAD)
    for id_ in (*good, *bad):
        ignored.pop(id_, None)  # marked under two contents, one of which is here
    try:
        vectors = index.vectors([*good, *bad])
    except KeyError:
        # The catalog is ahead of what this reader shows; it may only be behind by one publication.
        index.refresh()
        try:
            vectors = index.vectors([*good, *bad])
        except KeyError:
            raise TeachError("the index is just being changed; try again") from None
    return Found(good, bad, vectors[: len(good)], vectors[len(good) :], ignored)


def picture_print(entry: Entry) -> str:
    """16 characters that tell a picture's content from any other."""
    if entry.sha256:
        return entry.sha256[:PRINT_CHARACTERS]
    # Vectors that were imported have no content; their path is all that is known of them.
    name = entry.path.encode("utf-8", "surrogateescape")
    return hashlib.sha256(name).hexdigest()[:PRINT_CHARACTERS]


def _integers(name: str, ids: Iterable[Any]) -> list[int]:
    if isinstance(ids, str | bytes) or not isinstance(ids, Iterable):
        raise TeachError(f"{name} must be a list of ids, got {ids!r:.60}")
    numbers: dict[int, None] = {}
    for id_ in ids:
        try:
            number = as_integer(id_)
        except TypeError:
            raise TeachError(f"{name} must hold whole numbers, got {id_!r:.60}") from None
        if not 0 <= number < 2**63:
            raise TeachError(f"{name} holds a number that is no id; take ids from search results")
        numbers[number] = None
        if len(numbers) > MOST_MARKS:
            raise TeachError(f"too many marks at once; at most {MOST_MARKS:,} are kept per query")
    return list(numbers)


def _some(ids: Sequence[int]) -> str:
    shown = ", ".join(map(str, ids[:5]))
    return shown if len(ids) <= 5 else f"{shown} and {len(ids) - 5} more"
