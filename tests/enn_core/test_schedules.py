"""Learning rates over a run."""

from __future__ import annotations

from itertools import pairwise

import pytest

from enn_core.schedules import warm_up_cosine


def test_it_rises_and_falls_to_nothing() -> None:
    rates = [warm_up_cosine(step, 100) for step in range(100)]
    assert rates[:5] == pytest.approx([0.2, 0.4, 0.6, 0.8, 1.0])
    assert all(a > b for a, b in pairwise(rates[4:]))
    assert rates[-1] < 1e-3


@pytest.mark.parametrize("steps", [1, 2, 3])
def test_short_runs_have_rates(steps: int) -> None:
    rates = [warm_up_cosine(step, steps) for step in range(steps)]
    assert rates[0] == 1.0
    assert all(0 <= rate <= 1 for rate in rates)
