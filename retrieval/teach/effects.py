"""What teaching did to the pictures that users marked."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np

from retrieval.eigen_coordinates import scores
from retrieval.teach.knowledge import Knowledge, Unchanged, kind_of, marks_of
from retrieval.teach.marks import find, shown

if TYPE_CHECKING:
    from retrieval.index.eigen_index import EigenIndex

__all__ = ["Effect", "effects_of"]

# Pictures that are ranked: above, ranks are estimated from an even choice.
_RANKED = 10_000


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


def effects_of(state: Knowledge, index: EigenIndex) -> list[Effect]:
    """Of every taught query."""
    sample, size = index.sample(_RANKED), len(index)
    effects = []
    for query in state.taught:
        event = state.current[query]
        found = find(index, marks_of(state.events, query))
        c, kind = event.arrays["c"].astype(np.float64)[None], kind_of(event)
        ranks = [
            _mean_rank(mapping.recall(kind, c, c)[0], mapping.delta, vectors, sample, size)
            for vectors in (found.good_vectors, found.bad_vectors)
            for mapping in (Unchanged(), state.mapping)
        ]
        label = shown(query, event.details)
        effects.append(Effect(label, len(found.good), len(found.bad), *ranks))
    return effects


def _mean_rank(
    q: np.ndarray, delta: np.ndarray | None, marked: np.ndarray, sample: np.ndarray, size: int
) -> float:
    """Mean rank of some pictures among `size`, of which a sample is known."""
    if not len(marked):
        return math.nan
    others = np.sort(scores(q, sample, delta))
    better = len(others) - np.searchsorted(others, scores(q, marked, delta), "right")
    return float(1 + better.mean() * size / len(others))
