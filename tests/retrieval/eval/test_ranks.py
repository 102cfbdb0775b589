"""Ranks equal a brute-force oracle, whatever the ties, the chunks and the number of threads."""

from __future__ import annotations

import subprocess
import sys

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from ranking_cases import brute_ranks, exact_scores

from retrieval.eval.ranks import (
    best_captions,
    bootstrap_interval,
    fixed_point,
    retrieval_ranks,
    top_items,
)


@st.composite
def cases(draw):
    """Captions, images, owners; few distinct values or copied rows, so that many scores tie."""
    images = draw(st.integers(1, 9))
    extra = draw(st.integers(0, 12))
    rng = np.random.default_rng(draw(st.integers(0, 2**32 - 1)))
    owners = np.concatenate([np.arange(images), rng.integers(0, images, extra)])
    rng.shuffle(owners)
    texts, stored = (rng.normal(size=(n, 4)) for n in (len(owners), images))
    if draw(st.booleans()):
        texts, stored = np.sign(texts), np.sign(stored)
    if draw(st.booleans()):
        texts, stored = texts[rng.integers(0, len(texts), len(texts))], stored[:1].repeat(images, 0)
    size = draw(st.sampled_from([1.0, 1e-3, 700.0]))
    return (texts * size).astype(np.float32), stored.astype(np.float32), owners


@settings(max_examples=200)
@given(cases(), st.sampled_from([None, 1, 2, 3, 7]))
def test_ranks_equal_the_oracle_under_ties(case, chunk):
    texts, images, owners = case
    to_image, to_text = retrieval_ranks(texts, images, owners, chunk=chunk)
    expected = brute_ranks(exact_scores(texts, images), owners)
    assert (to_image.tolist(), to_text.tolist()) == expected


@settings(max_examples=50)
@given(cases())
def test_an_images_rank_is_its_best_captions(case):
    texts, images, owners = case
    best = best_captions(texts, images, owners)
    scores = exact_scores(texts, images)
    for n, m in enumerate(best):
        own = np.flatnonzero(owners == n)
        assert m == own[np.argmax(scores[own, n])]


@settings(max_examples=50)
@given(cases(), st.integers(1, 12))
def test_top_items_are_the_first_of_a_stable_sort(case, count):
    texts, images, _ = case
    which = list(range(0, len(texts), 2))
    expected = np.argsort(-exact_scores(texts, images)[which], axis=1, kind="stable")[:, :count]
    assert np.array_equal(top_items(texts, images, which, count), expected)


def test_chunks_change_nothing_at_real_widths():
    """Copies of vectors all over the matrix: BLAS treats its edges differently, sums may not."""
    rng = np.random.default_rng(0)
    images = rng.normal(size=(300, 512)).astype(np.float32)
    images /= np.linalg.norm(images, axis=1, keepdims=True)
    images[::7] = images[3]
    owners = np.repeat(np.arange(300), 5)
    texts = images[owners] + rng.normal(size=(1500, 512)).astype(np.float32) / 16
    texts /= np.linalg.norm(texts, axis=1, keepdims=True)
    texts[::11] = texts[4]
    expected = brute_ranks(exact_scores(texts, images), owners)
    for chunk in (None, 1000, 64, 37):
        to_image, to_text = retrieval_ranks(texts, images, owners, chunk=chunk)
        assert (to_image.tolist(), to_text.tolist()) == expected


def test_fixed_point_is_exact_and_as_fine_as_float32():
    rng = np.random.default_rng(1)
    vectors = rng.normal(size=(50, 512)).astype(np.float32)
    vectors /= np.linalg.norm(vectors, axis=1, keepdims=True)
    rows = fixed_point(vectors)(slice(None))
    assert np.abs(rows / 2.0**26 - vectors).max() <= 2.0**-27
    whole = rows.astype(np.int64)
    assert np.array_equal((rows @ rows.T).astype(np.int64), whole @ whole.T)
    assert np.array_equal((rows[:, ::-1] @ rows[:, ::-1].T).astype(np.int64), whole @ whole.T)


def test_vectors_that_are_no_numbers_are_refused():
    good, bad = np.ones((3, 4), np.float32), np.ones((3, 4), np.float32)
    for value in (np.nan, np.inf):
        bad[1, 2] = value
        with pytest.raises(ValueError, match="not finite"):
            retrieval_ranks(good, bad, np.arange(3))
    nothing = np.zeros((3, 4), np.float32)
    assert retrieval_ranks(nothing, good, np.arange(3))[0].tolist() == [1, 2, 3]


def test_a_collapsed_model_gets_no_credit():
    owners = np.repeat(np.arange(10), 5)
    same = np.ones((50, 4), np.float32)
    to_image, to_text = retrieval_ranks(same, same[:10], owners)
    assert np.mean(to_image <= 1) == 0.1
    assert np.mean(to_text <= 1) == 0.1


def test_progress_ends_at_all_pairs():
    steps: list[tuple[str, int, int]] = []
    vectors = np.eye(7, dtype=np.float32)
    retrieval_ranks(vectors, vectors, np.arange(7), chunk=3, progress=lambda *s: steps.append(s))
    assert steps[-1] == ("ranks", 49, 49)
    assert [done for _, done, _ in steps] == sorted({done for _, done, _ in steps})


def test_intervals_draw_whole_images():
    rng = np.random.default_rng(0)
    owners = np.repeat(np.arange(200), 5)
    independent = rng.random(1000) < 0.3
    repeated = np.repeat(rng.random(200) < 0.3, 5)
    narrow, wide = (np.diff(bootstrap_interval(h, owners))[0] for h in (independent, repeated))
    assert wide > 1.7 * narrow  # five equal answers are one observation
    assert bootstrap_interval(independent, owners) == bootstrap_interval(independent, owners)
    assert bootstrap_interval(independent, owners, samples=0) == (independent.mean(),) * 2


_PEAK = """
import resource, sys, numpy as np
from retrieval.eval.ranks import retrieval_ranks
n, m, r = map(int, sys.argv[1:])
rng = np.random.default_rng(0)
texts, images = (rng.standard_normal((k, r), dtype=np.float32) for k in (m, n))
base = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
to_image, to_text = retrieval_ranks(texts, images, np.arange(m) * n // m)
peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
print(base, peak, to_image.mean(), to_text.mean())
"""


def _memory(images: int, captions: int, dim: int) -> tuple[float, float, float, float]:
    """MB before and at the peak, mean ranks."""
    command = [sys.executable, "-c", _PEAK, *map(str, (images, captions, dim))]
    out = subprocess.run(command, capture_output=True, text=True, check=True, timeout=3000).stdout
    base, peak, to_image, to_text = map(float, out.split())
    return base / 1024, peak / 1024, to_image, to_text


def test_memory_is_that_of_a_block():
    base, peak, _, _ = _memory(3000, 15000, 32)  # all scores at once: 360 MB
    assert peak - base < 120


@pytest.mark.slow
@pytest.mark.timeout(3600)
def test_the_whole_flickr30k_fits_in_4_gib():
    """Long-CLIP's Flickr protocol: 5.05e9 scores, 40 GB at once in float64."""
    _, peak, to_image, to_text = _memory(31_783, 158_915, 512)
    assert peak < 4096
    assert abs(to_image / 15_892 - 1) < 0.02  # chance
    assert abs(to_text / (158_915 / 6) - 1) < 0.03
