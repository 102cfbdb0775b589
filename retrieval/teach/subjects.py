"""What a lesson is about: words, a picture, or words beside a picture.

Lessons are filed under one line of text. That of a picture holds a print of its content, so that
the same picture is known again under another name.
"""

from __future__ import annotations

import hashlib
import os
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import numpy.typing as npt

from retrieval.queries import Asked, QueryModel, query_coordinates
from retrieval.teach.marks import PRINT_CHARACTERS, TeachError, picture_print

if TYPE_CHECKING:
    from retrieval.index.eigen_index import EigenIndex
    from retrieval.queries import Picture

__all__ = [
    "MOST_CHARACTERS",
    "MOST_NAME",
    "Subject",
    "direction",
    "shown",
    "subject_of",
    "words_of",
]

MOST_CHARACTERS = 10_000
"""Length of a query that can be taught."""
MOST_NAME = 200
"""Characters of the name of a picture that was taught about."""


@dataclass(frozen=True)
class Subject:
    """What a lesson is about.

    Attributes:
        line: that its lessons are filed under.
        kind: words, a picture, or both.
        name: of the picture's file, for people; empty for words.
    """

    line: str
    kind: Asked
    name: str = ""


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
        return Subject(f"[picture {picture_print(entry)}]", "picture", _name(entry.path))
    if image is None:
        return Subject(words_of(text), "words")
    print_, name = _identified(image)
    line = f"[picture {print_}]"
    if text and text.strip():
        return Subject(f"{line} {words_of(text)}", "mixed", name)
    return Subject(line, "picture", name)


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
