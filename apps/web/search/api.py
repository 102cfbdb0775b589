"""The page's public HTTP API, for `gradio_client`: search, teach, preview, undo, history, forget.

Arguments and results are plain JSON. The endpoints stand behind the same guard as the page; whose
profiles they reach is decided by the request (`apps.web.visitors`), as on the page. Documented in
docs/web-api.md.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from functools import wraps
from inspect import signature
from typing import TYPE_CHECKING, Any

import gradio as gr

from apps.web.limits import API_CHARACTERS, API_IDS, API_RESULTS
from apps.web.search.collection import Collection
from apps.web.visitors import visitor_of
from retrieval.teach.profiles import DEFAULT

if TYPE_CHECKING:
    from apps.web.visitors import Shelf
    from retrieval.model.retrieval_model import RetrievalModel
    from retrieval.teach.teacher import HistoryEntry, Lesson, Teacher

__all__ = ["ENDPOINTS", "add_api"]

ENDPOINTS = ("collections", "search", "teach", "preview", "undo", "history", "forget")


def add_api(collections: Sequence[Collection], teachers: Shelf[RetrievalModel, Teacher]) -> None:
    """Adds the endpoints; call inside `gr.Blocks`."""
    api = _Api(collections, teachers)
    for name in ENDPOINTS:
        function = _told_in_one_line(getattr(api, name))
        gr.api(function, api_name=name, concurrency_id="api", concurrency_limit=4)


class _Api:
    """The endpoints. Types are checked by hand: Gradio passes on whatever JSON it is sent."""

    def __init__(
        self, collections: Sequence[Collection], teachers: Shelf[RetrievalModel, Teacher]
    ) -> None:
        self._collections = collections
        self._teachers = teachers

    def collections(self) -> list[dict]:
        """The collections of this server: number, name, pictures, model."""
        return [
            {
                "number": collection.number,
                "name": collection.name,
                "pictures": len(collection.index),
                "model": collection.model.name,
            }
            for collection in self._collections
        ]

    def search(
        self,
        request: gr.Request,
        text: str,
        k: int = 20,
        collection: int = 0,
        profile: str = DEFAULT,
        taught: bool = True,
    ) -> list[dict]:
        """The k pictures that fit a text best: id, score, file inside the folder, width, height."""
        # Not "path": the client would take such an object for a file to download.
        place = self._collection(collection)
        words = _text(text)
        count = _integer(k, "k", 1, API_RESULTS)
        knows = taught and visitor_of(request).scope is not None
        teacher = self._teacher(place, profile, request) if knows else None
        if teacher is not None:
            teacher.refresh()
        found = place.find(words, k=count, teacher=teacher)
        scores = dict(found.hits)
        entries = place.index.entries_of(found.ids)
        return [
            {
                "id": id,
                "score": round(scores[id], 6),
                "file": entries[id].path.encode("utf-8", "replace").decode(),
                "width": entries[id].width,
                "height": entries[id].height,
            }
            for id in found.ids
            if id in entries
        ]

    def teach(
        self,
        request: gr.Request,
        text: str,
        good: list[int] | None = None,
        bad: list[int] | None = None,
        unmark: list[int] | None = None,
        collection: int = 0,
        profile: str = DEFAULT,
        force: bool = False,
    ) -> dict:
        """Learn that pictures (ids) are good or bad answers; on disk when this returns."""
        place = self._collection(collection)
        lesson = self._teacher(place, profile, request).teach(
            place.index,
            _text(text),
            _ids(good, "good"),
            _ids(bad, "bad"),
            unmark=_ids(unmark, "unmark"),
            force=force is True,
        )
        return _lesson(lesson)

    def preview(
        self,
        request: gr.Request,
        text: str,
        good: list[int] | None = None,
        bad: list[int] | None = None,
        unmark: list[int] | None = None,
        collection: int = 0,
        profile: str = DEFAULT,
    ) -> dict:
        """What `teach` would do, without doing it."""
        place = self._collection(collection)
        lesson = self._teacher(place, profile, request).preview(
            place.index,
            _text(text),
            _ids(good, "good"),
            _ids(bad, "bad"),
            unmark=_ids(unmark, "unmark"),
        )
        return _lesson(lesson)

    def undo(
        self,
        request: gr.Request,
        entry: int | None = None,
        collection: int = 0,
        profile: str = DEFAULT,
    ) -> dict:
        """Take back an entry of the history, by default the newest; returns it."""
        place = self._collection(collection)
        number = None if entry is None else _integer(entry, "entry", 0, 2**53)
        teacher = self._teacher(place, profile, request)
        return _entry(teacher.undo(number, index=place.index))

    def history(
        self, request: gr.Request, collection: int = 0, profile: str = DEFAULT
    ) -> list[dict]:
        """All lessons of a profile, oldest first, undone ones included."""
        place = self._collection(collection)
        return [_entry(entry) for entry in self._teacher(place, profile, request).history()]

    def forget(
        self,
        request: gr.Request,
        text: str | None = None,
        collection: int = 0,
        profile: str = DEFAULT,
    ) -> int:
        """Erase a query's lessons, or all of them, for good; returns how many there were."""
        place = self._collection(collection)
        words = None if text is None else _text(text)
        return self._teacher(place, profile, request).forget(words)

    def _collection(self, number: Any) -> Collection:
        return self._collections[_integer(number, "collection", 0, len(self._collections) - 1)]

    def _teacher(self, collection: Collection, profile: Any, request: gr.Request) -> Teacher:
        scope = visitor_of(request).known()
        return self._teachers.get(collection.model, scope, profile)


def _told_in_one_line(function: Callable) -> Callable:
    """Expected errors reach the client as their one line, others as Gradio's "Error"."""

    @wraps(function)
    def told(*args: Any, **kwargs: Any) -> Any:
        try:
            return function(*args, **kwargs)
        except (LookupError, ValueError, RuntimeError, OSError) as error:
            text = str(error.args[0]) if isinstance(error, KeyError) and error.args else str(error)
            raise gr.Error(" ".join(text.split())[:500], print_exception=False) from error

    # Gradio reads the types of the result from here, and does not resolve their names.
    told.__signature__ = signature(function, eval_str=True)  # type: ignore[attr-defined]
    return told


def _text(value: Any) -> str:
    if not isinstance(value, str) or not value.strip():
        raise ValueError("text is empty; give the words of a search")
    if len(value) > API_CHARACTERS:
        raise ValueError(f"text has {len(value):,} characters; at most {API_CHARACTERS:,} are read")
    return value.encode("utf-8", "ignore").decode()


def _integer(value: Any, name: str, least: int, most: int) -> int:
    if isinstance(value, bool) or not isinstance(value, int) or not least <= value <= most:
        raise ValueError(f"{name} is {value!r:.40}; valid: an integer from {least} to {most}")
    return value


def _ids(value: Any, name: str) -> list[int]:
    """Ids; `None` stands for none."""
    if value is None:
        return []
    if not isinstance(value, list) or len(value) > API_IDS:
        raise ValueError(f"{name} must be a list of at most {API_IDS:,} ids")
    return [_integer(each, name, 0, 2**62) for each in value]


def _lesson(lesson: Lesson) -> dict[str, Any]:
    return {
        "entry": lesson.entry,
        "query": lesson.query,
        "rule": lesson.rule,
        "good": list(lesson.good),
        "bad": list(lesson.bad),
        "ignored": {str(id): reason for id, reason in lesson.ignored.items()},
        "kept_text": lesson.kept_text,
        "marks_before": _number(lesson.marks_before),
        "marks_after": _number(lesson.marks_after),
        "overlap": _number(lesson.overlap),
        "overlap_total": _number(lesson.overlap_total),
        "worse": [
            [query, _number(before), _number(after)] for query, before, after in lesson.worse
        ],
        "refused": lesson.refused,
        "seconds": _number(lesson.seconds),
    }


def _entry(entry: HistoryEntry) -> dict[str, Any]:
    return {
        "entry": entry.entry,
        "at": entry.at,
        "query": entry.query,
        "good": list(entry.good),
        "bad": list(entry.bad),
        "unmarked": list(entry.unmarked),
        "rule": entry.rule,
        "active": entry.active,
        "kept_text": entry.kept_text,
    }


def _number(value: float) -> float | None:
    """JSON has no NaN."""
    return round(float(value), 6) if math.isfinite(value) else None
