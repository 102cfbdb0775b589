"""What a lesson would do to everything else, before it is accepted.

Two things are compared before and after: the best pictures of about 200 generic queries (shipped in
`protected.txt`), and how well the queries taught earlier still agree with their own marks. Both are
measured on an even choice of the stored vectors, so that a million pictures cost no more than two
thousand.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cache
from importlib.resources import files

import numpy as np
import numpy.typing as npt

from retrieval.eigen_coordinates import scores
from retrieval.queries import Mapping

__all__ = [
    "LEAST_OVERLAP",
    "MOST_AGREEMENT_LOST",
    "MOST_LOST_BY_ONE",
    "SAMPLE",
    "Marks",
    "agreements",
    "best",
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


@dataclass(frozen=True, eq=False)
class Marks:
    """A taught query with the pictures that its user marked.

    Attributes:
        c: (r,) coordinates of the query as its words give them.
        good, bad: (n, r) and (m, r) stored vectors.
    """

    c: np.ndarray
    good: np.ndarray
    bad: np.ndarray


@cache
def protected_queries() -> tuple[str, ...]:
    """The shipped queries."""
    text = files("retrieval.teach").joinpath("protected.txt").read_text("utf-8")
    return tuple(line for line in text.splitlines() if line and not line.startswith("#"))


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
    if not taught:
        return []
    queries = mapping.map(np.stack([marks.c for marks in taught]))
    return [
        _agreement(q, mapping.delta, marks, sample)
        for q, marks in zip(queries, taught, strict=True)
    ]


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
    return "not learned: " + "; ".join(reasons) + "; mark other pictures, or force it"
