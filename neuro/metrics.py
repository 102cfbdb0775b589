"""How far predicted ages are off, over all ages and by decade, with plots.

>>> import numpy as np
>>> scores = evaluate(np.array([30.0, 45, 58]), np.array([28.0, 44, 61]))
>>> scores["mae"], scores["n"]
(2.0, 3)
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

__all__ = ["by_decade", "evaluate", "paired_difference", "plot_agreement"]


def evaluate(
    predicted: np.ndarray | Sequence[float], ages: np.ndarray | Sequence[float]
) -> dict[str, Any]:
    """Scores of predicted against true ages.

    Returns:
        `mae` and `rmse` (years), `r` (Pearson), `r2` (share of variance explained, against the
        mean of these ages), `bias` (mean gap, years), `bias_slope` (gap per year of age) and `n`.
        What a single scan or a single age cannot tell is NaN.

    Raises:
        ValueError: nothing to score, different lengths, or values that are not finite.
    """
    predicted, ages = _checked(predicted, ages)
    gap = predicted - ages
    centred = ages - ages.mean()
    spread = float(centred @ centred)
    several = len(ages) > 1 and spread > 0
    r = float("nan")
    if several and np.ptp(predicted) > 0:
        r = float(np.corrcoef(predicted, ages)[0, 1])
    return {
        "mae": float(np.abs(gap).mean()),
        "rmse": float(np.sqrt(np.mean(gap**2))),
        "r": r,
        "r2": 1 - float(gap @ gap) / spread if several else float("nan"),
        "bias": float(gap.mean()),
        "bias_slope": float(centred @ gap) / spread if several else float("nan"),
        "n": len(ages),
    }


def by_decade(
    predicted: np.ndarray | Sequence[float], ages: np.ndarray | Sequence[float]
) -> list[dict[str, Any]]:
    """`mae`, `bias` and `n` of each decade of age that occurs, youngest first."""
    predicted, ages = _checked(predicted, ages)
    decades = (ages // 10 * 10).astype(int)
    rows = []
    for decade in np.unique(decades):
        gap = (predicted - ages)[decades == decade]
        rows.append(
            {
                "decade": f"{decade}-{decade + 9}",
                "mae": float(np.abs(gap).mean()),
                "bias": float(gap.mean()),
                "n": len(gap),
            }
        )
    return rows


def paired_difference(
    errors: np.ndarray, reference: np.ndarray, draws: int = 10_000, seed: int = 0
) -> tuple[float, float, float]:
    """Mean difference of absolute errors and its 95 % bootstrap interval over subjects.

    Args:
        errors: (n,) or (n, repeats) absolute errors; repeats of a subject stay together.
        reference: the other method's, same subjects and shape.
        draws, seed: of the bootstrap.

    Returns:
        (difference, low, high) in years; negative where `errors` are smaller.
    """
    errors, reference = np.asarray(errors, np.float64), np.asarray(reference, np.float64)
    if errors.shape != reference.shape or not len(errors):
        raise ValueError(f"got errors {errors.shape} and {reference.shape}; pairs are needed")
    each = (errors - reference).reshape(len(errors), -1).mean(1)
    rng = np.random.default_rng(seed)
    means = np.array([each[rng.integers(len(each), size=len(each))].mean() for _ in range(draws)])
    low, high = np.quantile(means, [0.025, 0.975])
    return float(each.mean()), float(low), float(high)


def plot_agreement(
    predicted: np.ndarray | Sequence[float],
    ages: np.ndarray | Sequence[float],
    path: Path | str,
    intervals: np.ndarray | None = None,
    title: str = "",
) -> Path:
    """Scatter of predicted over true age beside a Bland-Altman plot, written as PNG, SVG or PDF.

    Args:
        predicted, ages: (n,) years.
        path: of the picture.
        intervals: (n, 2), drawn as error bars if given.
        title: above both.
    """
    from matplotlib.figure import Figure

    predicted, ages = _checked(predicted, ages)
    scores = evaluate(predicted, ages)
    figure = Figure(figsize=(10, 4.6), layout="constrained")
    scatter, agreement = figure.subplots(1, 2)
    ends = [min(ages.min(), predicted.min()) - 3, max(ages.max(), predicted.max()) + 3]
    scatter.plot(ends, ends, color="0.6", linewidth=1)
    if intervals is not None:
        bars = np.abs(np.asarray(intervals).T - predicted)
        scatter.errorbar(ages, predicted, bars, fmt="none", ecolor="0.8", elinewidth=1, zorder=1)
    scatter.scatter(ages, predicted, s=16, alpha=0.75, linewidths=0, zorder=2)
    scatter.set(xlabel="age (years)", ylabel="predicted age (years)", xlim=ends, ylim=ends)
    scatter.set_aspect("equal")
    scatter.set_title(f"MAE {scores['mae']:.2f} y, r {scores['r']:.3f}, n = {scores['n']}")

    gap, middle = predicted - ages, (predicted + ages) / 2
    half = 1.96 * gap.std()
    agreement.scatter(middle, gap, s=16, alpha=0.75, linewidths=0)
    for level, style in ((gap.mean(), "-"), (gap.mean() - half, "--"), (gap.mean() + half, "--")):
        agreement.axhline(level, color="0.4", linestyle=style, linewidth=1)
        agreement.annotate(
            f"{level:+.1f}", (1, level), xycoords=("axes fraction", "data"), xytext=(-4, 3),
            textcoords="offset points", ha="right", fontsize=9,
        )  # fmt: skip
    agreement.set(xlabel="mean of both (years)", ylabel="predicted - true age (years)")
    agreement.set_title(f"bias {scores['bias']:+.1f} y, slope on age {scores['bias_slope']:+.2f}")
    if title:
        figure.suptitle(title)
    figure.savefig(path, dpi=150)
    return Path(path)


def _checked(
    predicted: np.ndarray | Sequence[float], ages: np.ndarray | Sequence[float]
) -> tuple[np.ndarray, np.ndarray]:
    predicted, ages = np.asarray(predicted, np.float64), np.asarray(ages, np.float64)
    if predicted.shape != ages.shape or predicted.ndim != 1 or not len(ages):
        raise ValueError(
            f"got {predicted.shape} predicted and {ages.shape} true ages; give one of each per scan"
        )
    if not (np.isfinite(predicted).all() and np.isfinite(ages).all()):
        raise ValueError("an age is not finite; leave out scans without an age or a prediction")
    return predicted, ages
