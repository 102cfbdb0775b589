"""Simulated users of search feedback: concepts, marks and average precision.

A concept is a content word that stands in at least three of the five captions of 1.5 to 16 percent
of the images; its query is "a photo of WORD". In each of three rounds the user marks the ten
best pictures not yet seen, by the same captions. What counts is the average precision (AP) among
the pictures never shown, beside that of the unchanged query among the same pictures.

Every method gets the same marks: `marks` ranks the second and third round by a plain method that
its caller names.
"""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np
from sklearn.feature_extraction.text import ENGLISH_STOP_WORDS

ROUNDS = 3
SHOWN = 10  # pictures marked per round
SHARE = (0.015, 0.16)  # of the images that a concept may have
AGREEING = 3  # of five captions

# Besides scikit-learn's list: what captions say of almost everything.
_VAGUE = {"front", "group", "large", "little", "long", "look", "looking", "looks", "middle", "near"}
_VAGUE |= {"outside", "sits", "sitting", "small", "standing", "stands", "wearing", "wears", "young"}
_EMPTY_WORDS = ENGLISH_STOP_WORDS | _VAGUE


@dataclass(frozen=True)
class Concept:
    """A word and the images it stands for, (N,) bool."""

    word: str
    relevant: np.ndarray

    @property
    def query(self) -> str:
        return f"a photo of {self.word}"


def concepts(captions: Sequence[str], owners: np.ndarray, images: int) -> list[Concept]:
    """Concepts of a captioned collection, by falling frequency."""
    counts: list[Counter[str]] = [Counter() for _ in range(images)]
    for caption, owner in zip(captions, owners, strict=True):
        counts[owner].update(set(re.findall(r"[a-z]+", caption.lower())))
    often = Counter(word for each in counts for word, n in each.items() if n >= AGREEING)
    low, high = SHARE[0] * images, SHARE[1] * images
    found = []
    for word, number in often.most_common():
        if low <= number <= high and word not in _EMPTY_WORDS and len(word) > 2:
            found.append(Concept(word, np.array([each[word] >= AGREEING for each in counts])))
    return found


def average_precision(scores: np.ndarray, relevant: np.ndarray) -> float:
    """AP of a ranking, 0..1; ties in the order of the images, NaN if nothing is relevant."""
    hits = relevant[np.argsort(-scores, kind="stable")]
    if not hits.any():
        return float("nan")
    places = np.flatnonzero(hits) + 1
    return float((np.arange(1, len(places) + 1) / places).mean())


def marks(
    c: np.ndarray,
    vectors: np.ndarray,
    relevant: np.ndarray,
    fit: Callable[[np.ndarray, np.ndarray, np.ndarray], np.ndarray],
    rounds: int = ROUNDS,
    shown: int = SHOWN,
) -> list[np.ndarray]:
    """Images marked in each round, (shown,) each.

    Args:
        c: (r,) query.
        vectors: (N, r) images.
        relevant: (N,) bool, what the user wants.
        fit: (c, good vectors, bad vectors) -> direction that ranks the next round.
    """
    seen = np.zeros(len(vectors), bool)
    direction, batches = c, []
    for _ in range(rounds):
        order = np.argsort(-(vectors @ direction), kind="stable")
        batch = order[~seen[order]][:shown]
        seen[batch] = True
        batches.append(batch)
        chosen = np.flatnonzero(seen)
        liked = relevant[chosen]
        direction = fit(c, vectors[chosen[liked]], vectors[chosen[~liked]])
    return batches
