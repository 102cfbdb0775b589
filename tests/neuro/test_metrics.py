"""Scores and plots of predicted ages."""

from __future__ import annotations

import math

import numpy as np
import pytest
from scipy import stats

from neuro.metrics import by_decade, evaluate, paired_difference, plot_agreement


@pytest.fixture
def some() -> tuple[np.ndarray, np.ndarray]:
    rng = np.random.default_rng(0)
    ages = rng.uniform(20, 80, 60)
    return 12 + 0.75 * ages + rng.normal(0, 5, 60), ages


def test_scores_equal_their_formulas(some):
    predicted, ages = some
    scores = evaluate(predicted, ages)
    assert scores["n"] == 60
    assert scores["mae"] == pytest.approx(np.mean(np.abs(predicted - ages)))
    assert scores["r"] == pytest.approx(stats.pearsonr(predicted, ages)[0])
    assert scores["bias_slope"] == pytest.approx(stats.linregress(ages, predicted - ages).slope)
    assert scores["r2"] == pytest.approx(1 - np.var(predicted - ages) / np.var(ages), abs=0.01)
    assert evaluate(ages, ages)["r2"] == 1


def test_one_scan_has_no_correlation():
    scores = evaluate([40.0], [42.0])
    assert scores["mae"] == 2
    assert all(math.isnan(scores[name]) for name in ("r", "r2", "bias_slope"))
    assert math.isnan(evaluate([40.0, 40.0], [30.0, 50.0])["r"])


def test_decades(some):
    rows = by_decade(*some)
    assert [row["decade"] for row in rows] == sorted(row["decade"] for row in rows)
    assert sum(row["n"] for row in rows) == 60
    total = sum(row["mae"] * row["n"] for row in rows) / 60
    assert total == pytest.approx(evaluate(*some)["mae"])


def test_paired_differences():
    rng = np.random.default_rng(1)
    reference = rng.uniform(0, 12, (80, 3))
    difference, low, high = paired_difference(reference - 1, reference, draws=300)
    assert (difference, low, high) == pytest.approx((-1, -1, -1))
    difference, low, high = paired_difference(rng.permutation(reference), reference, draws=300)
    assert low < 0 < high
    with pytest.raises(ValueError, match="pairs are needed"):
        paired_difference(reference, reference[:3])


def test_plots_are_written(some, tmp_path):
    predicted, ages = some
    intervals = np.stack([predicted - 9, predicted + 9], axis=1)
    path = plot_agreement(predicted, ages, tmp_path / "a.png", intervals, "made-up brains")
    assert path.read_bytes()[:4] == b"\x89PNG"


@pytest.mark.parametrize(
    ("predicted", "ages"), [([], []), ([1.0], [1.0, 2.0]), ([1.0], [float("nan")])]
)
def test_what_cannot_be_scored(predicted, ages):
    with pytest.raises(ValueError, match=r"one of each per scan|not finite"):
        evaluate(predicted, ages)
