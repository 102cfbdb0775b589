"""Ranks of right answers: exact, the same for every chunk size, thread count and BLAS.

Coordinates are rounded to 26-bit fixed point (steps of 2^-26 for unit vectors, the precision that
float32 has there). A product of two such vectors is then a sum of integers below 2^53, which
float64 adds without any rounding, in whatever order a matrix product adds them: equal vectors get
equal scores, and the ranks depend on nothing but the vectors.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import numpy.typing as npt

__all__ = [
    "TIE_RULE",
    "best_captions",
    "bootstrap_interval",
    "fixed_point",
    "own_cosines",
    "retrieval_ranks",
    "top_items",
]

TIE_RULE = (
    "coordinates rounded to 26 bits, scores exact; of equal scores the earlier item of the data "
    "set ranks first"
)

Progress = Callable[[str, int, int], None]

# Rows and columns of the block of scores that is held at a time: 32 MB.
_ROWS, _COLUMNS = 512, 8192

_BITS = 26


def fixed_point(vectors: npt.NDArray[np.floating[Any]]) -> Callable[[Any], np.ndarray]:
    """Rows of vectors as float64 integers of at most 26 bits, made block by block.

    Args:
        vectors: (N, r), finite.

    Returns:
        Function of a slice (or index array) of rows. Products of its rows with those of another
        such set are exact.

    Raises:
        ValueError: if a number is not finite.
    """
    longest = 0.0
    for start in range(0, len(vectors), _COLUMNS):
        block = vectors[start : start + _COLUMNS].astype(np.float64)
        longest = max(longest, float(np.sqrt(np.einsum("nr,nr->n", block, block).max())))
        if not np.isfinite(longest) or not np.isfinite(block).all():
            raise ValueError("vectors hold numbers that are not finite; the model is damaged")
    # Unit vectors are a rounding longer than 1 now and then; they shall not lose a bit for it.
    scale = 2.0 ** (_BITS - np.frexp(longest * (1 - 2**-20))[1])
    return lambda rows: np.rint(vectors[rows].astype(np.float64) * scale)


def retrieval_ranks(
    texts: npt.NDArray[np.float32],
    images: npt.NDArray[np.float32],
    image_of_caption: npt.NDArray[np.integer[Any]],
    *,
    chunk: int | None = None,
    progress: Progress | None = None,
) -> tuple[npt.NDArray[np.int64], npt.NDArray[np.int64]]:
    """Ranks of the right answers, 1 the best, under this module's tie rule.

    Every score is computed once, for both directions; besides the vectors a block of scores and
    the ranks are in memory.

    Args:
        texts: (M, r) query coordinates of captions.
        images: (N, r) stored vectors; every image has at least one caption.
        image_of_caption: (M,) position in images.
        chunk: images and captions of a block; by default 32 MB of scores.
        progress: called with ("ranks", pairs done, pairs).

    Returns:
        (M,) rank of each caption's image among the images, and (N,) rank of each image's best
        caption among the captions.
    """
    owners = np.asarray(image_of_caption, dtype=np.int64)
    text_rows, image_rows = fixed_point(texts), fixed_point(images)
    own = _own_scores(text_rows, image_rows, owners)
    best = _first_best(own, owners, len(images))
    best_score = own[best]
    to_image = np.ones(len(texts), dtype=np.int64)
    to_text = np.ones(len(images), dtype=np.int64)
    for rows in _blocks(len(images), chunk or _ROWS):
        of_rows = image_rows(rows)
        for columns in _blocks(len(texts), chunk or _COLUMNS):
            scores = of_rows @ text_rows(columns).T
            to_text[rows] += _ahead(scores, best_score[rows], best[rows], columns)
            to_image[columns] += _ahead(scores.T, own[columns], owners[columns], rows)
            if progress is not None:
                done = rows.start * len(texts) + (rows.stop - rows.start) * columns.stop
                progress("ranks", done, len(images) * len(texts))
    return to_image, to_text


def best_captions(
    texts: npt.NDArray[np.float32],
    images: npt.NDArray[np.float32],
    image_of_caption: npt.NDArray[np.integer[Any]],
) -> npt.NDArray[np.int64]:
    """(N,) position of each image's best caption, the first of equals: the one its rank counts."""
    owners = np.asarray(image_of_caption, dtype=np.int64)
    own = _own_scores(fixed_point(texts), fixed_point(images), owners)
    return _first_best(own, owners, len(images))


def own_cosines(
    texts: npt.NDArray[np.float32],
    images: npt.NDArray[np.float32],
    image_of_caption: npt.NDArray[np.integer[Any]],
) -> npt.NDArray[np.float32]:
    """(M,) score of each caption with its own image, as a cosine."""
    owners = np.asarray(image_of_caption, dtype=np.int64)
    cosines = np.empty(len(owners), dtype=np.float32)
    for rows in _blocks(len(owners), _COLUMNS):
        cosines[rows] = np.einsum("mr,mr->m", texts[rows], images[owners[rows]])
    return cosines


def top_items(
    queries: npt.NDArray[np.float32], items: npt.NDArray[np.float32], which: Any, count: int
) -> npt.NDArray[np.int64]:
    """(len(which), count) best items of some queries, under this module's tie rule.

    Args:
        queries: (M, r), all of them: their longest decides the rounding.
        items: (N, r).
        which: positions of the queries that are asked.
        count: how many, at most N.
    """
    asked, item_rows = fixed_point(queries), fixed_point(items)
    positions = np.asarray(which, dtype=np.int64)
    found = np.empty((len(positions), min(count, len(items))), dtype=np.int64)
    for part in _blocks(len(positions), max(1, _ROWS * _COLUMNS // max(len(items), 1))):
        of_part = asked(positions[part])
        scores = np.empty((len(of_part), len(items)))
        for rows in _blocks(len(items), _COLUMNS):
            scores[:, rows] = of_part @ item_rows(rows).T
        found[part] = _sorted_top(scores, found.shape[1])
    return found


def _sorted_top(scores: np.ndarray, count: int) -> npt.NDArray[np.int64]:
    """Places of the best `count` of each row, the earlier first of equals; without a full sort."""
    last = np.partition(scores, -count, axis=1)[:, -count]
    top = np.empty((len(scores), count), dtype=np.int64)
    for row, bar in enumerate(last):
        near = np.flatnonzero(scores[row] >= bar)
        top[row] = near[np.argsort(-scores[row, near], kind="stable")[:count]]
    return top


def bootstrap_interval(
    hits: npt.NDArray[Any],
    owners: npt.NDArray[np.integer[Any]],
    *,
    samples: int = 1000,
    seed: int = 0,
) -> tuple[float, float]:
    """95 % percentile interval of mean(hits) when whole images are drawn again.

    Args:
        hits: (M,) booleans, one per query.
        owners: (M,) image that each query belongs to, 0..N-1.
        samples: resamplings; 0 gives the mean itself twice.
        seed: the same seed draws the same images for any hits, so differences can be paired.
    """
    mean = float(np.mean(hits))
    if samples < 1:
        return mean, mean
    won = np.bincount(owners, weights=np.asarray(hits, dtype=np.float64))
    asked = np.bincount(owners).astype(np.float64)
    rng = np.random.default_rng(seed)
    means = np.empty(samples)
    for i in range(samples):
        drawn = rng.integers(0, len(won), len(won))
        means[i] = won[drawn].sum() / asked[drawn].sum()
    low, high = np.percentile(means, [2.5, 97.5])
    return float(low), float(high)


def _own_scores(
    text_rows: Callable[[Any], np.ndarray],
    image_rows: Callable[[Any], np.ndarray],
    owners: npt.NDArray[np.int64],
) -> npt.NDArray[np.float64]:
    own = np.empty(len(owners))
    for rows in _blocks(len(owners), _COLUMNS):
        own[rows] = np.einsum("mr,mr->m", text_rows(rows), image_rows(owners[rows]))
    return own


def _first_best(own: np.ndarray, owners: np.ndarray, images: int) -> npt.NDArray[np.int64]:
    # By image, then best first, then earliest first; the first row of each image is its best.
    order = np.lexsort((np.arange(len(own)), -own, owners))
    return order[np.searchsorted(owners[order], np.arange(images))]


def _ahead(
    scores: np.ndarray, own: np.ndarray, position: np.ndarray, items: slice
) -> npt.NDArray[np.int64]:
    """How many of a block's items rank before each query's own answer.

    scores is (queries, items of the slice); own and position are score and place of the answer.
    """
    # Items before the answer win a tie, those behind it lose one.
    bar = np.where(position >= items.stop, np.nextafter(own, -np.inf), own)
    count = (scores > bar[:, None]).view(np.uint8).sum(axis=1, dtype=np.int64)
    for query in np.flatnonzero((position >= items.start) & (position < items.stop)):
        before = scores[query, : position[query] - items.start]
        count[query] += np.count_nonzero(before == own[query])
    return count


def _blocks(total: int, size: int) -> list[slice]:
    return [slice(start, min(start + size, total)) for start in range(0, total, size)]
