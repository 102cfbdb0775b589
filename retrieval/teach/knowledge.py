"""What a profile knows: a function of the active lessons in its journal, and of nothing else.

The same lessons give the same bits, on one platform with the same versions; their order does not
matter beyond rounding.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from collections.abc import Mapping as Mapping_
from dataclasses import dataclass, replace
from functools import cached_property
from typing import Any

import numpy as np
import numpy.typing as npt

from enn_core.lessons.adapter import RidgeAdapter
from enn_core.lessons.errors import JournalCorrupt
from enn_core.lessons.events import TEACH, Event, latest
from retrieval.queries import Asked, Mapping
from retrieval.teach import local_rule
from retrieval.teach.fitting import ALPHA
from retrieval.teach.lookup import OTHER, SAME, LookedUp, Recalled, near_words
from retrieval.teach.marks import BAD, GOOD, MOST_NAME, WITHDRAWN, Mark, merge, read_marks, shown

__all__ = [
    "ADAPTER",
    "LOCAL_RULE",
    "LOOKUP",
    "NOTHING",
    "REFIT",
    "RULES",
    "UPGRADE",
    "Adapted",
    "Knowledge",
    "Unchanged",
    "check_event",
    "derive",
    "kind_of",
    "lessons_on",
    "marks_of",
    "merged",
    "rule_of",
    "settled",
    "stored_vectors",
]

LOOKUP, ADAPTER, LOCAL_RULE = "lookup", "adapter", "local"
RULES = (LOOKUP, ADAPTER, LOCAL_RULE)
"""How lessons become a change of the model: a look-up of taught queries, a ridge map of queries (of
profiles from before the look-up), or steps on its last layer."""

REFIT = "refit"
"""Kind of the events that fit a query again after one of its lessons was undone."""
KINDS: tuple[Asked, ...] = ("words", "picture", "mixed")
UPGRADE = "upgrade"
"""Kind of the event from which on pairs of the rule "adapter" are looked up."""

# Lengths that a unit vector may have as float16, with room for other ways of rounding.
_UNIT = (0.98, 1.02)


class Unchanged:
    """The mapping of a profile that was taught nothing."""

    delta = None

    def map(self, rows: npt.NDArray[np.floating]) -> npt.NDArray[np.float32]:
        return np.asarray(rows, np.float32)

    def recall(
        self, kind: Asked, asked: npt.NDArray[np.floating], rows: npt.NDArray[np.floating]
    ) -> npt.NDArray[np.float32]:
        return np.asarray(rows, np.float32)


class Adapted:
    """Queries through a ridge adapter, at the length they had: scores stay cosines.

    A query that was taught itself gets its own target, whatever the ridge and its neighbours make
    of it; this fades out with the angle.

    Args:
        adapter: the map of the pairs.
        inputs: (n, r) taught queries of about unit length.
        targets: (n, r) what they became.
    """

    delta = None

    def __init__(
        self,
        adapter: RidgeAdapter,
        inputs: npt.NDArray[np.float64],
        targets: npt.NDArray[np.float64],
    ) -> None:
        self.adapter, self.inputs, self.targets = adapter, inputs, targets
        self._known_misses: dict[int, npt.NDArray[np.float64]] = {}

    def map(self, rows: npt.NDArray[np.floating]) -> npt.NDArray[np.float32]:
        given = np.asarray(rows, np.float64)
        wanted = np.linalg.norm(given, axis=-1, keepdims=True)
        moved = self.adapter.apply(given) + self._recalled(given, wanted)
        lengths = np.linalg.norm(moved, axis=-1, keepdims=True)
        usable = lengths > 1e-6 * wanted
        scaled = np.where(usable, moved * (wanted / np.where(usable, lengths, 1)), given)
        return scaled.astype(np.float32)

    def recall(
        self, kind: Asked, asked: npt.NDArray[np.floating], rows: npt.NDArray[np.floating]
    ) -> npt.NDArray[np.float32]:
        return self.map(rows) if kind == "words" else np.asarray(rows, np.float32)

    def _missed(self, number: int) -> npt.NDArray[np.float64]:
        """(r,) what the adapter misses of the target of a taught query."""
        if number not in self._known_misses:
            own = self.adapter.apply(self.inputs[number : number + 1])[0]
            self._known_misses[number] = self.targets[number] - own
        return self._known_misses[number]

    def _recalled(self, rows: np.ndarray, lengths: np.ndarray) -> np.ndarray:
        """What the adapter misses of the target of a taught query, for rows that are one."""
        recalled = np.zeros_like(rows)
        if not len(self.inputs):
            return recalled
        sizes = np.where(lengths > 0, lengths, 1) * np.linalg.norm(self.inputs, axis=1)
        # A single query gives the same bits on any number of threads.
        one = len(rows) == 1
        cosines = (
            np.einsum("nr,mr->nm", rows, self.inputs) if one else rows @ self.inputs.T
        ) / sizes
        most = cosines.max(axis=1)
        # Of two ways to say the same, the one taught last.
        same = cosines >= most[:, None] - (1 - SAME)
        nearest = len(self.inputs) - 1 - same[:, ::-1].argmax(axis=1)
        share = np.clip((most - OTHER) / (SAME - OTHER), 0, 1)
        own = np.flatnonzero(share)
        for row in own:
            recalled[row] = share[row] * lengths[row] * self._missed(int(nearest[row]))
        return recalled


@dataclass(frozen=True, eq=False)
class Knowledge:
    """What a profile knows.

    Attributes:
        version: of the journal; None if there is none, or it must be read again.
        rule: one of `RULES`, or None if there are no lessons.
        events: the active ones, by seq.
        current: by query, the event that now stands for it; those taught last at the end.
        pairs: seq of the events whose pairs the mapping has, in order.
        mapping: how it changes searches.
    """

    version: int | None
    rule: str | None
    events: tuple[Event, ...]
    current: dict[str, Event]
    pairs: tuple[int, ...]
    mapping: Mapping

    @cached_property
    def taught(self) -> tuple[str, ...]:
        """The queries that have marks, those taught last at the end."""
        return tuple(q for q, event in self.current.items() if event.details.get("marks_left"))

    def lines(self, kind: Asked) -> list[str]:
        """The taught queries of one kind for people, in the order of their pairs."""
        by_seq = {event.seq: event for event in self.current.values()}
        events = [by_seq[seq] for seq in self.pairs]
        return [shown(e.subject, e.details) for e in events if kind_of(e) == kind]


NOTHING = Knowledge(None, None, (), {}, (), Unchanged())


def derive(
    events: Sequence[Event],
    version: int | None,
    anchors: npt.NDArray[np.float64],
    previous: Knowledge,
) -> Knowledge:
    """What active events amount to.

    Args:
        events: by seq.
        version: of the journal.
        anchors: (m, r) unit coordinates of the protected queries.
        previous: only saves work, as far as its pairs are the first of these.

    Raises:
        JournalCorrupt: if the journal was written by something else.
    """
    current = _current(events)
    rule = rule_of(events, current)
    if not current or rule is None:
        return Knowledge(version, rule, tuple(events), {}, (), Unchanged())
    if rule == LOCAL_RULE:
        lessons = [_local_lesson(events, query, event) for query, event in current.items()]
        mapping: Mapping = local_rule.learn(lessons, anchors)
        return Knowledge(version, rule, tuple(events), current, (), mapping)
    pairs = [event for event in current.values() if "b" in event.arrays]
    seqs = tuple(event.seq for event in pairs)
    same = _common(previous.pairs, seqs)
    learn = _looked_up if rule == LOOKUP else _adapted
    mapping = learn(pairs, same, previous.mapping, anchors)
    return Knowledge(version, rule, tuple(events), current, seqs, mapping)


def rule_of(events: Iterable[Event], current: Mapping_[str, Event] | None = None) -> str | None:
    """The rule that active events are answered by, None if there are none.

    Pairs of queries and targets are the same under both rules that have them: once one lesson was
    learned by the look-up, or the profile was upgraded, all of them are looked up.

    Args:
        events: the active ones.
        current: by query, the event that stands for it.

    Raises:
        JournalCorrupt: if the journal was written by something else.
    """
    standing = (current or {}).values()
    rules = {e.details.get("rule") for e in events if e.kind in (TEACH, UPGRADE)}
    rules |= {event.details.get("rule") for event in standing}
    if not rules <= set(RULES) or (LOCAL_RULE in rules and len(rules) > 1):
        raise JournalCorrupt(f"the journal mixes rules, or holds unknown ones ({rules!r:.60})")
    return next((rule for rule in RULES if rule in rules), None)


def _adapted(
    pairs: Sequence[Event], same: int, known: Mapping, anchors: npt.NDArray[np.float64]
) -> Adapted:
    """The ridge map of pairs, of which `known` has the first `same`."""
    dim = anchors.shape[1]
    if not isinstance(known, Adapted):
        known = Adapted(RidgeAdapter(dim, alpha=ALPHA), np.empty((0, dim)), np.empty((0, dim)))
        same = 0
    a, b = _rows(pairs[same:], dim)
    return Adapted(
        known.adapter.first(same).with_pairs(a, b),
        np.concatenate([known.inputs[:same], a]),
        np.concatenate([known.targets[:same], b]),
    )


def _looked_up(
    pairs: Sequence[Event], same: int, known: Mapping, anchors: npt.NDArray[np.float64]
) -> Recalled:
    """The look-up of pairs, of which `known` has the first `same`."""
    dim = anchors.shape[1]
    if not isinstance(known, Recalled):
        nothing = LookedUp(np.empty((0, dim)), np.empty((0, dim)), np.empty((0, 2)))
        known, same = Recalled(nothing, nothing, nothing, near_words(anchors)), 0
    kinds = [kind_of(event) for event in pairs]
    parts = {}
    for kind in KINDS:
        new = [i for i in range(same, len(pairs)) if kinds[i] == kind]
        near = [known.near if kind == "words" else pairs[i].details["near"] for i in new]
        rows = _rows([pairs[i] for i in new], dim)
        parts[kind] = kinds[:same].count(kind), *rows, np.array(near).reshape(-1, 2)
    return known.with_rows(parts)


def _rows(
    pairs: Sequence[Event], dim: int
) -> tuple[npt.NDArray[np.float64], npt.NDArray[np.float64]]:
    """Taught directions and their targets, (n, dim) each."""
    a, b = (
        np.array([event.arrays[name] for event in pairs], np.float64).reshape(-1, dim)
        for name in ("c", "b")
    )
    return a, b


def kind_of(event: Event) -> Asked:
    """What the query of a lesson consists of."""
    kind: Asked = event.details.get("kind", "words")
    return kind


def settled(drafted: Knowledge, event: Event) -> Knowledge:
    """A drafted state once its last event is written as `event`, one version on."""
    draft = drafted.events[-1]
    return replace(
        drafted,
        version=(drafted.version or 0) + 1,
        events=(*drafted.events[:-1], event),
        current={**drafted.current, event.subject: event},
        pairs=tuple(event.seq if seq == draft.seq else seq for seq in drafted.pairs),
    )


def lessons_on(events: Iterable[Event], query: str) -> list[Event]:
    """The lessons on one query."""
    return [event for event in events if event.kind == TEACH and event.subject == query]


def merged(lessons: Iterable[Event]) -> list[Mark]:
    """The marks that hold after some lessons on one query."""
    try:
        return merge([read_marks(event.details) for event in lessons])
    except ValueError as error:
        raise JournalCorrupt(f"a lesson in the journal is damaged: {error}") from None


def marks_of(events: Iterable[Event], query: str) -> list[Mark]:
    """The marks that hold for a query."""
    return merged(lessons_on(events, query))


def stored_vectors(
    lessons: Sequence[Event],
) -> tuple[npt.NDArray[np.float64], npt.NDArray[np.float64]]:
    """Vectors of good (n, r) and bad (m, r) marks, as lessons by the local rule keep them."""
    rows: dict[tuple[int, str], np.ndarray] = {}
    for event in lessons:
        marks = [mark for mark in merged([event]) if mark.sign != WITHDRAWN]
        # Past the first ones no vectors are kept.
        rows |= zip(((mark.id, mark.print) for mark in marks), event.arrays["marked"], strict=False)
    vectors: dict[int, list[np.ndarray]] = {GOOD: [], BAD: []}
    for mark in merged(lessons):
        if (mark.id, mark.print) in rows:
            vectors[mark.sign].append(rows[mark.id, mark.print])
    dim = lessons[0].arrays["c"].shape[-1]
    good, bad = (np.array(vectors[sign], np.float64).reshape(-1, dim) for sign in (GOOD, BAD))
    return good, bad


def check_event(event: Event, dim: int) -> None:
    """Refuse what `derive` could not use, of an event from elsewhere.

    Raises:
        ValueError: what is wrong.
    """
    rule = event.details.get("rule")
    if event.kind == UPGRADE and rule == LOOKUP and not event.arrays:
        return
    if event.kind not in (TEACH, REFIT) or rule not in RULES:
        raise ValueError("an event is no lesson of a search")
    if " ".join(event.subject.split()) != event.subject or not event.subject:
        raise ValueError("the words of a lesson are empty or spaced out")
    details = event.details
    if type(details.get("kept_text")) is not bool or type(details.get("marks_left")) is not int:
        raise ValueError("a lesson does not say what came of it")
    if details.get("kind", "words") != "words":
        _check_picture(details, rule)
    marks = read_marks(details) if event.kind == TEACH else []
    wanted: dict[str, tuple[int, ...]] = {"c": (dim,)}
    if rule == LOCAL_RULE and event.kind == TEACH:
        kept = sum(mark.sign != WITHDRAWN for mark in marks)
        wanted["marked"] = (min(kept, local_rule.MOST_STORED), dim)
    elif rule != LOCAL_RULE and "b" in event.arrays:
        wanted["b"] = (dim,)
    if {name: array.shape for name, array in event.arrays.items()} != wanted:
        raise ValueError("the numbers of a lesson do not fit the model")
    for array in event.arrays.values():
        lengths = np.linalg.norm(array.astype(np.float64), axis=-1)
        if not np.all((lengths > _UNIT[0]) & (lengths < _UNIT[1])):
            raise ValueError("the numbers of a lesson are no directions")


def _check_picture(details: Mapping_[str, Any], rule: str) -> None:
    """Refuse a lesson on a picture that could not be looked up."""
    if details["kind"] not in KINDS or rule != LOOKUP:
        raise ValueError("a lesson is about something unknown")
    near = details.get("near")
    if not isinstance(near, list) or [type(each) for each in near] != [float, float]:
        raise ValueError("a lesson on a picture does not say what is near it")
    if not -1 <= near[0] < near[1] <= 1:
        raise ValueError("a lesson on a picture says nonsense about what is near it")
    name = details.get("picture")
    if not isinstance(name, str) or len(name) > MOST_NAME:
        raise ValueError("a lesson on a picture has no short name of it")


def _current(events: Sequence[Event]) -> dict[str, Event]:
    """The event that stands for each query, those taught last at the end.

    Where lessons of two files came together and nothing was fitted on all of them yet, the newest
    one stands.
    """
    held = latest(events)
    newest = {event.subject: event for event in events if event.kind == TEACH}
    # In this order the next mark of the same query changes the last pair only.
    order = sorted(newest, key=lambda query: newest[query].seq)
    return {query: held.get(query, newest[query]) for query in order}


def _local_lesson(events: Iterable[Event], query: str, held: Event) -> local_rule.LocalLesson:
    """What the local rule learns from for one query."""
    good, bad = stored_vectors(lessons_on(events, query))
    c = held.arrays["c"].astype(np.float64)
    return local_rule.LocalLesson(c, good, bad, keep=bool(held.details.get("kept_text")))


def _common(first: Sequence[int], second: Sequence[int]) -> int:
    """Length of the common beginning."""
    same = 0
    for a, b in zip(first, second, strict=False):
        if a != b:
            break
        same += 1
    return same
