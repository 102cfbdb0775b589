"""Brute force for the tests of ranks: every score as a Python-sized integer, every list sorted."""

from __future__ import annotations

import numpy as np

__all__ = ["brute_ranks", "brute_recall", "exact_scores"]


def exact_scores(texts: np.ndarray, images: np.ndarray) -> np.ndarray:
    """(M, N) int64 products of the coordinates in 26-bit fixed point, by the rule's own words."""

    def integers(vectors: np.ndarray) -> np.ndarray:
        wide = vectors.astype(np.float64)
        longest = max(np.sqrt((wide**2).sum(axis=1))) * (1 - 2**-20)
        exponent = 0
        while 2.0**exponent > longest > 0:
            exponent -= 1
        while 2.0**exponent <= longest:
            exponent += 1
        return np.rint(wide * 2.0 ** (26 - exponent)).astype(np.int64)

    return integers(texts) @ integers(images).T


def brute_ranks(scores: np.ndarray, owners: np.ndarray) -> tuple[list[int], list[int]]:
    """Ranks by sorting everything: stable, so that of equal scores the earlier item is first."""
    to_image = [
        1 + list(np.argsort(-row, kind="stable")).index(owner)
        for row, owner in zip(scores, owners, strict=True)
    ]
    to_text = [
        1 + min(list(order).index(m) for m in np.flatnonzero(owners == n))
        for n, order in enumerate(np.argsort(-scores, axis=0, kind="stable").T)
    ]
    return to_image, to_text


def brute_recall(scores: np.ndarray, owners: np.ndarray, k: int) -> tuple[float, float]:
    """Recall@K of (M captions x N images) scores, text to image and image to text."""
    to_image, to_text = (np.array(ranks) for ranks in brute_ranks(scores, owners))
    return float(np.mean(to_image <= k)), float(np.mean(to_text <= k))
