"""What teaching reports: lessons, the history, and what they did."""

from __future__ import annotations

from dataclasses import dataclass

from enn_core.lessons.events import Event
from retrieval.teach.marks import BAD, GOOD, WITHDRAWN, read_marks

__all__ = ["Effect", "HistoryEntry", "Lesson", "history_entry"]


@dataclass(frozen=True)
class Lesson:
    """What a lesson did, or would do.

    Attributes:
        entry: its number in the history; None for a preview and for what was refused.
        query: the words, with single spaces.
        rule: "adapter" or "local".
        good, bad: ids of all pictures now marked for this query that this index has.
        ignored: marked ids that this index does not have, with the reason.
        kept_text: the words alone agree at least as well with held-out marks, so that this query
            stays as it is.
        marks_before, marks_after: agreement (area under the ROC curve, 0..1) of the query with
            held-out marks, by its words alone and as fitted; NaN with too few marks.
        overlap: share of the generic queries' best pictures that this lesson leaves in place.
        overlap_total: the same, for everything taught so far.
        worse: (query, agreement before, after) of queries taught earlier that lose by it.
        refused: why nothing was learned, one line; None if it was.
        seconds: from the call to the durable result.
    """

    entry: int | None
    query: str
    rule: str
    good: tuple[int, ...]
    bad: tuple[int, ...]
    ignored: dict[int, str]
    kept_text: bool
    marks_before: float
    marks_after: float
    overlap: float
    overlap_total: float
    worse: tuple[tuple[str, float, float], ...]
    refused: str | None
    seconds: float


@dataclass(frozen=True)
class HistoryEntry:
    """A lesson in the history.

    Attributes:
        entry: its number; numbers are never used again.
        at: seconds since the epoch.
        query: the words.
        good, bad, unmarked: the ids that this lesson marked, in the index it was given in.
        rule: "adapter" or "local".
        active: False once it is undone.
        kept_text: see `Lesson`.
    """

    entry: int
    at: float
    query: str
    good: tuple[int, ...]
    bad: tuple[int, ...]
    unmarked: tuple[int, ...]
    rule: str
    active: bool
    kept_text: bool


@dataclass(frozen=True)
class Effect:
    """Where the marked pictures of a taught query stand, without and with what was taught.

    Attributes:
        query: the words.
        good, bad: how many marked pictures this index has.
        good_before, good_after, bad_before, bad_after: their mean rank, 1 is best; NaN if there
            are none. In a large index estimated from an even choice of its pictures.
    """

    query: str
    good: int
    bad: int
    good_before: float
    good_after: float
    bad_before: float
    bad_after: float


def history_entry(event: Event) -> HistoryEntry:
    """A journalled lesson as the history shows it."""
    marks = read_marks(event.details)
    return HistoryEntry(
        entry=event.seq,
        at=event.at,
        query=event.subject,
        good=tuple(mark.id for mark in marks if mark.sign == GOOD),
        bad=tuple(mark.id for mark in marks if mark.sign == BAD),
        unmarked=tuple(mark.id for mark in marks if mark.sign == WITHDRAWN),
        rule=str(event.details.get("rule")),
        active=event.active,
        kept_text=bool(event.details.get("kept_text")),
    )
