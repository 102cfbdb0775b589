"""Means, deviations and paired intervals of few seeds."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from statistics import fmean, stdev

__all__ = ["interval", "paired", "spread"]

# 97.5 % quantiles of Student's t for 1, 2, ... degrees of freedom.
_T = (
    *(12.706, 4.303, 3.182, 2.776, 2.571, 2.447, 2.365, 2.306, 2.262, 2.228),
    *(2.201, 2.179, 2.160, 2.145, 2.131, 2.120, 2.110, 2.101, 2.093, 2.086),
    *(2.080, 2.074, 2.069, 2.064, 2.060, 2.056, 2.052, 2.048, 2.045, 2.042),
)


def spread(values: Sequence[float]) -> float | None:
    """Standard deviation (n - 1); None for fewer than two values."""
    return stdev(values) if len(values) > 1 else None


def interval(values: Sequence[float]) -> tuple[float, float] | None:
    """95 % interval of the mean by Student's t; None for fewer than two values."""
    if len(values) < 2:
        return None
    degrees = len(values) - 1
    t = _T[degrees - 1] if degrees <= len(_T) else 1.96 + 2.5 / degrees
    half = t * stdev(values) / math.sqrt(len(values))
    return fmean(values) - half, fmean(values) + half


def paired(
    values: Mapping[int, float], baseline: Mapping[int, float]
) -> tuple[float, tuple[float, float] | None] | None:
    """Mean difference to a baseline over the seeds both have, and its 95 % interval (Student's t).

    None without a common seed.
    """
    differences = [values[seed] - baseline[seed] for seed in sorted(values) if seed in baseline]
    if not differences:
        return None
    return fmean(differences), interval(differences)
