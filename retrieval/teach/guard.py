"""What a lesson would do to everything else, before it is accepted.

Two things are compared before and after: the best pictures of about 200 generic queries (shipped in
`protected.txt`), and how well the queries taught earlier still agree with their own marks. Both are
measured on an even choice of the stored vectors, so that a million pictures cost no more than two
thousand.
"""

from __future__ import annotations

import threading
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cache
from importlib.resources import files
from typing import TYPE_CHECKING, Any
from weakref import WeakKeyDictionary

import numpy as np
import numpy.typing as npt

from retrieval.eigen_coordinates import scores
from retrieval.queries import Asked, Mapping, QueryModel
from retrieval.teach.knowledge import KINDS, Knowledge, Unchanged, kind_of, marks_of
from retrieval.teach.marks import BAD, GOOD, find

if TYPE_CHECKING:
    from retrieval.index.eigen_index import EigenIndex

__all__ = [
    "LEAST_OVERLAP",
    "MOST_AGREEMENT_LOST",
    "MOST_LOST_BY_ONE",
    "SAMPLE",
    "Guard",
    "Marks",
    "agreements",
    "best",
    "encode_protected",
    "overlap",
    "protected_queries",
    "verdict",
]

SAMPLE = 2000
"""Stored vectors that the guard looks at."""
LEAST_OVERLAP = 0.95
"""Share of the protected queries' best pictures that one lesson must leave in place: 201 ordinary
lessons on training images left 0.975 or more, targets opposite to their query 0.89 to 0.98."""
MOST_AGREEMENT_LOST = 0.10
"""How much of their agreement with their marks the queries taught earlier may lose on average."""
MOST_LOST_BY_ONE = 0.20
"""How much of it any one of them may lose."""

_BEST = 20
# Of a small collection twenty pictures would be nearly all, and nothing could ever move.
_BEST_SHARE = 5

# Queries taught earlier that a lesson is checked against, the newest ones, and marks of each.
_CHECKED_QUERIES = 100
_CHECKED_MARKS = 50
# Answers that are kept: of the untaught model, before, after, and of a preview.
_REMEMBERED_TOPS = 4
# An agreement that fell by less than this is not worth a line.
_NOTEWORTHY = 0.01


@dataclass(frozen=True, eq=False)
class Marks:
    """A taught query with the pictures that its user marked.

    Attributes:
        c: (r,) coordinates of the query without teaching.
        good, bad: (n, r) and (m, r) stored vectors.
        kind: what the query consists of.
    """

    c: np.ndarray
    good: np.ndarray
    bad: np.ndarray
    kind: Asked = "words"


class Guard:
    """Compares what one profile knows before and after a lesson; for one thread at a time.

    Remembers what the next comparison needs again: before a lesson is after the one before.
    """

    def __init__(self) -> None:
        self._tops: list[tuple[Mapping | None, np.ndarray, np.ndarray]] = []
        self._marks: dict[str, tuple[str, np.ndarray, Marks]] = {}

    def compare(
        self,
        index: EigenIndex,
        protected: npt.NDArray[np.float64],
        before: Knowledge,
        after: Knowledge,
        query: str,
    ) -> dict[str, Any]:
        """The fields of a `Lesson` that tell what it does to other queries.

        Args:
            index: where the pictures are.
            protected: (m, r) coordinates of the generic queries.
            before, after: what is known.
            query: that the lesson is about.
        """
        sample = index.sample(SAMPLE)  # another object whenever the index has changed
        untaught, old, new = (
            self._best(mapping, protected, sample)
            for mapping in (Unchanged(), before.mapping, after.mapping)
        )
        taught = self._earlier(index, sample, before, query)
        agreed = [
            agreements(state.mapping, list(taught.values()), sample) for state in (before, after)
        ]
        earlier = list(zip(taught, *agreed, strict=True))
        share = overlap(old, new)
        return {
            "overlap": share,
            "overlap_total": overlap(untaught, new),
            "worse": tuple(each for each in earlier if each[1] - each[2] > _NOTEWORTHY),
            "refused": verdict(share, [each[1:] for each in earlier], queries=len(protected)),
        }

    def forget(self) -> None:
        """Keep nothing of the queries taught so far."""
        self._marks.clear()

    def _best(self, mapping: Mapping, queries: np.ndarray, sample: np.ndarray) -> np.ndarray:
        """`best`, remembered."""
        key = None if isinstance(mapping, Unchanged) else mapping
        for i, (known_key, known_sample, found) in enumerate(self._tops):
            if known_key is key and known_sample is sample:
                self._tops.append(self._tops.pop(i))
                return found
        found = best(mapping, queries, sample)
        self._tops = [*self._tops[1 - _REMEMBERED_TOPS :], (key, sample, found)]
        return found

    def _earlier(
        self, index: EigenIndex, sample: np.ndarray, state: Knowledge, query: str
    ) -> dict[str, Marks]:
        """The queries taught before, with those of their marked pictures that the index has."""
        taught = {}
        for other in [each for each in state.taught if each != query][-_CHECKED_QUERIES:]:
            event = state.current[other]
            kept = self._marks.get(other)
            if kept is None or kept[0] != event.uid or kept[1] is not sample:
                marks = marks_of(state.events, other)
                good = [mark for mark in marks if mark.sign == GOOD][-_CHECKED_MARKS:]
                bad = [mark for mark in marks if mark.sign == BAD][-_CHECKED_MARKS:]
                found = find(index, [*good, *bad])
                c = event.arrays["c"].astype(np.float64)
                marked = found.good_vectors, found.bad_vectors
                kept = event.uid, sample, Marks(c, *marked, kind_of(event))
                self._marks[other] = kept
            taught[other] = kept[2]
        return taught


@cache
def protected_queries() -> tuple[str, ...]:
    """The shipped queries."""
    text = files("retrieval.teach").joinpath("protected.txt").read_text("utf-8")
    return tuple(line for line in text.splitlines() if line and not line.startswith("#"))


def encode_protected(model: QueryModel) -> npt.NDArray[np.float64]:
    """Encode the protected queries, half a second of work, so that no first lesson waits for it.

    Returns:
        (m, r) unit coordinates, as a journal keeps them.
    """
    with _preparing:
        if model in _prepared:
            return _prepared[model]
        vectors = model.text_vectors(protected_queries()).astype(np.float64)
        lengths = np.linalg.norm(vectors, axis=1, keepdims=True)
        unit = np.divide(vectors, lengths, out=np.zeros_like(vectors), where=lengths > 0)
        _prepared[model] = unit.astype(np.float16).astype(np.float64)
        return _prepared[model]


_preparing = threading.Lock()
_prepared: WeakKeyDictionary[QueryModel, npt.NDArray[np.float64]] = WeakKeyDictionary()


def best(
    mapping: Mapping, queries: npt.NDArray[np.floating], sample: npt.NDArray[np.float32]
) -> npt.NDArray[np.bool_]:
    """Which pictures of a sample (N, r) are among the best of queries (m, r): (m, N)."""
    chosen = np.zeros((len(queries), len(sample)), bool)
    count = min(_BEST, max(1, len(sample) // _BEST_SHARE))
    if len(sample) <= count:
        return ~chosen
    found = scores(mapping.map(queries), sample, mapping.delta)
    rows = np.argpartition(-found, count - 1, axis=1)[:, :count]
    np.put_along_axis(chosen, rows, True, axis=1)
    return chosen


def overlap(before: npt.NDArray[np.bool_], after: npt.NDArray[np.bool_]) -> float:
    """Mean share, 0..1, of the best pictures that stay among the best; 1 if there are none."""
    total = before.sum()
    return float((before & after).sum() / total) if total else 1.0


def agreements(
    mapping: Mapping, taught: Sequence[Marks], sample: npt.NDArray[np.float32]
) -> list[float]:
    """How well queries rank their good pictures above their bad ones.

    Where one kind is missing, the sample stands for it.

    Returns:
        area under the ROC curve of each, 0..1; NaN where there is nothing to compare.
    """
    queries: dict[int, np.ndarray] = {}
    for kind in KINDS:
        places = [i for i, marks in enumerate(taught) if marks.kind == kind]
        if places:
            rows = np.stack([taught[i].c for i in places])
            queries |= zip(places, mapping.recall(kind, rows, rows), strict=True)
    return [_agreement(queries[i], mapping.delta, marks, sample) for i, marks in enumerate(taught)]


def _agreement(
    q: np.ndarray, delta: np.ndarray | None, marks: Marks, sample: npt.NDArray[np.float32]
) -> float:
    good = marks.good if len(marks.good) else sample
    bad = marks.bad if len(marks.bad) else sample
    if not (len(good) and len(bad) and len(marks.good) + len(marks.bad)):
        return float("nan")
    high, low = scores(q, good, delta), np.sort(scores(q, bad, delta))
    below = np.searchsorted(low, high, "left") + np.searchsorted(low, high, "right")
    return float(below.mean() / (2 * len(low)))


def verdict(
    step_overlap: float, earlier: Sequence[tuple[float, float]], *, queries: int
) -> str | None:
    """Why a lesson should not be accepted, in one line with numbers, or None.

    Args:
        step_overlap: what `overlap` gives for before and after this lesson.
        earlier: agreement before and after, of every query taught earlier.
        queries: number of protected queries.
    """
    reasons = []
    if step_overlap < LEAST_OVERLAP:
        reasons.append(
            f"{1 - step_overlap:.0%} of the best pictures of {queries} generic queries would "
            f"change (at most {1 - LEAST_OVERLAP:.0%} may)"
        )
    lost = [before - after for before, after in earlier if before - after == before - after]
    if lost and sum(lost) / len(lost) > MOST_AGREEMENT_LOST:
        reasons.append(
            f"queries taught earlier would agree {sum(lost) / len(lost):.2f} less with their own "
            f"marks (at most {MOST_AGREEMENT_LOST:.2f})"
        )
    elif lost and max(lost) > MOST_LOST_BY_ONE:
        reasons.append(
            f"a query taught earlier would agree {max(lost):.2f} less with its own marks (at most "
            f"{MOST_LOST_BY_ONE:.2f})"
        )
    if not reasons:
        return None
    return "not learned: " + "; ".join(reasons) + "; mark other pictures, or teach it anyway"
