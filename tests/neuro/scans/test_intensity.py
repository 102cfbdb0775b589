"""The value that a brain's intensities are scaled by."""

from __future__ import annotations

import numpy as np
import pytest

from neuro.scans.intensity import bright_excess, white_level
from neuro.scans.preprocess import to_uint8
from neuro.scans.template import load_template


@pytest.fixture(scope="module")
def values() -> np.ndarray:
    template, mask = load_template()
    noise = np.random.default_rng(0).normal(0, 0.03, int(mask.sum()))
    return np.clip(template[mask] + noise, 0.01, None).astype(np.float32)[::10]


def with_tail(values: np.ndarray, share: float, brightness: float) -> np.ndarray:
    changed = values.copy()
    at = np.random.default_rng(1).permutation(values.size)[: int(share * values.size)]
    changed[at] = brightness * np.percentile(values, 99)
    return changed


def test_an_ordinary_brain_is_scaled_by_its_percentile(values):
    assert white_level(values) == np.percentile(values, 99)
    assert bright_excess(values) == 0


@pytest.mark.parametrize("share", [0.005, 0.009, 0.011, 0.015, 0.03, 0.1])
@pytest.mark.parametrize("brightness", [1.6, 2.0, 10.0])
def test_what_shines_does_not_move_it(values, share, brightness):
    changed = with_tail(values, share, brightness)
    assert white_level(changed) == pytest.approx(white_level(values), rel=0.03)
    assert bright_excess(changed) > 0


def test_there_is_no_cliff(values):
    """Neither as more shines nor as it shines brighter."""
    for path in (
        [with_tail(values, share, 2.0) for share in np.linspace(0, 0.03, 61)],
        [with_tail(values, 0.015, bright) for bright in np.linspace(1, 1.6, 301)],
    ):
        levels = np.array([white_level(changed) for changed in path])
        assert np.abs(np.diff(levels)).max() < 0.05 * levels[0]
        assert levels.max() < 1.35 * levels[0]


def test_what_is_scaled_stays_as_it_is(values):
    for changed in (values, with_tail(values, 0.02, 3.0)):
        once = to_uint8(changed)
        assert np.abs(to_uint8(once.astype(np.float32)).astype(int) - once).max() <= 1
