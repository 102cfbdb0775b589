"""What teaching reports: lessons, upgrades and the history."""

from __future__ import annotations

from dataclasses import dataclass

from enn_core.lessons.events import Event
from retrieval.teach.marks import BAD, GOOD, WITHDRAWN, read_marks, shown

__all__ = ["HistoryEntry", "Lesson", "Upgrade", "history_entry"]


@dataclass(frozen=True)
class Lesson:
    """What a lesson did, or would do.

    Attributes:
        entry: its number in the history; None for a preview and for what was refused.
        query: the words, with single spaces; of a picture, the line it is filed under.
        shown: the query for people: the name of a picture in place of its print.
        rule: one of `RULES`.
        good, bad: ids of all pictures now marked for this query that this index has.
        ignored: marked ids that this index does not have, with the reason.
        kept_text: the words alone agree at least as well with held-out marks, so that this query
            stays as it is.
        marks_before, marks_after: agreement (area under the ROC curve, 0..1) of the query with
            held-out marks, by its words alone and as fitted; NaN with too few marks.
        overlap: share of the generic queries' best pictures that this lesson leaves in place.
        overlap_total: the same, for everything taught so far.
        worse: (query, agreement before, after) of queries taught earlier that lose by it.
        reaches: (generic query, share of the move that it takes, 0..1) of those that move with
            this lesson, greatest first; none under rules that do not look up.
        untouched: how many generic queries it leaves exactly as they are; None if unknown.
        refused: why nothing was learned, one line; None if it was.
        seconds: from the call to the durable result.
    """

    entry: int | None
    query: str
    shown: str
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
    reaches: tuple[tuple[str, float], ...]
    untouched: int | None
    refused: str | None
    seconds: float


@dataclass(frozen=True)
class Upgrade:
    """What looking up old lessons changes, or would change.

    Attributes:
        queries: how many are taught; each keeps its own answers, other wordings may change.
        overlap: share of the generic queries' best pictures that stays.
        worse: (query, agreement before, after) of taught queries that lose by it.
        done: False for a preview.
    """

    queries: int
    overlap: float
    worse: tuple[tuple[str, float, float], ...]
    done: bool


@dataclass(frozen=True)
class HistoryEntry:
    """A lesson in the history.

    Attributes:
        entry: its number; numbers are never used again.
        at: seconds since the epoch.
        query: the words; for a picture, the line that its lessons are filed under.
        shown: the query for people: the name of a picture in place of its print.
        good, bad, unmarked: the ids that this lesson marked, in the index it was given in.
        rule: one of `RULES`.
        active: False once it is undone.
        kept_text: see `Lesson`.
    """

    entry: int
    at: float
    query: str
    shown: str
    good: tuple[int, ...]
    bad: tuple[int, ...]
    unmarked: tuple[int, ...]
    rule: str
    active: bool
    kept_text: bool


def history_entry(event: Event) -> HistoryEntry:
    """A journalled lesson as the history shows it."""
    marks = read_marks(event.details)
    return HistoryEntry(
        entry=event.seq,
        at=event.at,
        query=event.subject,
        shown=shown(event.subject, event.details),
        good=tuple(mark.id for mark in marks if mark.sign == GOOD),
        bad=tuple(mark.id for mark in marks if mark.sign == BAD),
        unmarked=tuple(mark.id for mark in marks if mark.sign == WITHDRAWN),
        rule=str(event.details.get("rule")),
        active=event.active,
        kept_text=bool(event.details.get("kept_text")),
    )
