"""What a user says: about which query, and which pictures are good answers to it and which bad.

A query is words, a picture, or words beside a picture.

A mark names a picture by its id in the index and by a print of its content, so that a mark from
another index, or of a file that was replaced since, is never taken for one of the picture that now
has that id.
"""

from __future__ import annotations

import hashlib
import os
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from operator import index as as_integer
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import numpy.typing as npt

from retrieval.queries import Asked, QueryModel, query_coordinates

if TYPE_CHECKING:
    from retrieval.index.eigen_index import EigenIndex, Entry
    from retrieval.queries import Picture

__all__ = [
    "BAD",
    "GOOD",
    "MOST_CHARACTERS",
    "MOST_MARKS",
    "MOST_NAME",
    "PRINT_CHARACTERS",
    "WITHDRAWN",
    "Found",
    "Mark",
    "Subject",
    "TeachError",
    "checked_ids",
    "direction",
    "find",
    "known",
    "merge",
    "picture_print",
    "read_marks",
    "shown",
    "subject_of",
    "words_of",
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


# --- what marks are about -------------------------------------------------------------------------

MOST_CHARACTERS = 10_000
"""Length of a query that can be taught."""
MOST_NAME = 200
"""Characters of the name of a picture that was taught about."""


@dataclass(frozen=True)
class Subject:
    """What a lesson is about.

    Attributes:
        line: that its lessons are filed under. That of a picture holds a print of its content, so
            that the same picture is known again under another name.
        kind: words, a picture, or both.
        name: of the picture's file, for people; empty for words.
        shown: the line for people, with the name in place of the print.
    """

    line: str
    kind: Asked
    name: str
    shown: str


def words_of(text: object) -> str:
    """A query as lessons on it are filed: with single spaces.

    Raises:
        TeachError: if it is no text that can be taught.
    """
    if not isinstance(text, str):
        raise TeachError(f"only words and pictures can be taught, got {type(text).__name__}")
    line = " ".join(text.split())
    if not line:
        raise TeachError("the query is empty; give the words that the marks are about")
    if len(line) > MOST_CHARACTERS:
        raise TeachError(
            f"the query has {len(line):,} characters; at most {MOST_CHARACTERS:,} can be taught"
        )
    try:
        line.encode("utf-8")
    except UnicodeEncodeError:
        raise TeachError("the query holds characters that are no text; type it anew") from None
    return line


def subject_of(
    text: str | None,
    image: Picture | None = None,
    *,
    like: int | None = None,
    index: EigenIndex | None = None,
) -> Subject:
    """What a search asks for, as lessons on it are filed.

    Args:
        text: words, or None.
        image: path, file bytes or PIL image.
        like: id of a picture in `index`, in place of words and an image.

    Raises:
        TeachError: if it cannot be taught.
        ImageError: if the image cannot be read.
    """
    if like is not None:
        if text or image is not None or index is None:
            raise TeachError("give words, a picture, or the id of a picture; not several of them")
        entry = index.entries_of([like]).get(like)
        if entry is None or entry.state != "indexed":
            raise TeachError(f"no searchable picture has the id {like}")
        print_, name = picture_print(entry), _name(entry.path)
        return Subject(f"[picture {print_}]", "picture", name, f"[{name}]")
    if image is None:
        line = words_of(text)
        return Subject(line, "words", "", line)
    print_, name = _identified(image)
    line, label = f"[picture {print_}]", f"[{name}]"
    if text and text.strip():
        words = words_of(text)
        return Subject(f"{line} {words}", "mixed", name, f"{label} {words}")
    return Subject(line, "picture", name, label)


def direction(
    model: QueryModel,
    index: EigenIndex,
    text: str | None,
    image: Picture | None,
    like: int | None,
) -> npt.NDArray[np.float64]:
    """(r,) coordinates of what is asked for, without teaching."""
    if like is not None:
        return index.vectors([like])[0].astype(np.float64)
    return query_coordinates(model, index, text, image).astype(np.float64)


def _identified(image: Picture) -> tuple[str, str]:
    """Print and name of a picture."""
    digest = hashlib.sha256()
    name = "a picture"
    if isinstance(image, bytes):
        digest.update(image)
    elif isinstance(image, str | os.PathLike):
        name = _name(os.fspath(image))
        try:
            with open(image, "rb") as file:
                for block in iter(lambda: file.read(1 << 20), b""):
                    digest.update(block)
        except OSError:
            from retrieval.images import decode

            decode(image)  # says what is wrong
            raise
    else:
        digest.update(repr((image.mode, image.size)).encode())
        digest.update(image.tobytes())
    return digest.hexdigest()[:PRINT_CHARACTERS], name


def _name(path: str) -> str:
    """Of a file, as a line of text can hold it."""
    plain = Path(path).name.encode("utf-8", "replace").decode("utf-8")
    return " ".join("".join(c if c.isprintable() else " " for c in plain).split())[:MOST_NAME]


def shown(line: str, details: dict[str, Any]) -> str:
    """A subject for people: the name of the picture in place of its print."""
    name = details.get("picture")
    if not isinstance(name, str) or not line.startswith("[picture "):
        return line
    return f"[{name}]{line[line.index(']') + 1 :]}"
