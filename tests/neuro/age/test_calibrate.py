"""Bias corrections and conformal intervals."""

from __future__ import annotations

import json

import numpy as np
import pytest

from enn_core.files.digests import SEAL
from neuro.age.calibrate import (
    BiasCorrection,
    Calibration,
    CalibrationError,
    Conformal,
    coverage,
)


@pytest.fixture
def some() -> tuple[np.ndarray, np.ndarray]:
    rng = np.random.default_rng(0)
    ages = rng.uniform(20, 80, 200)
    return 14 + 0.7 * ages + rng.normal(0, 4, 200), ages


def slope_of_gap(predicted: np.ndarray, ages: np.ndarray) -> float:
    return float(np.polyfit(ages, predicted - ages, 1)[0])


@pytest.mark.parametrize("method", ["cole", "beheshti", "delange"])
def test_corrections_remove_the_slope(some, method):
    predicted, ages = some
    bias = BiasCorrection.fit(predicted, ages, method)
    corrected = bias.apply(predicted, ages if bias.needs_age else None)
    assert abs(slope_of_gap(predicted, ages)) > 0.25
    assert slope_of_gap(corrected, ages) == pytest.approx(0, abs=1e-9) or method == "cole"
    assert np.polyfit(ages, corrected, 1)[0] == pytest.approx(1, abs=1e-9)
    assert np.mean(corrected - ages) == pytest.approx(0, abs=1e-9)
    assert BiasCorrection(**bias.to_dict()) == bias


def test_cole_needs_no_age_and_pays_with_spread(some):
    predicted, ages = some
    bias = BiasCorrection.fit(predicted, ages, "cole")
    assert bias.slope == pytest.approx(0.7, abs=0.03)
    residual = np.std(predicted - np.polyval(np.polyfit(ages, predicted, 1), ages))
    assert np.std(bias.apply(predicted) - ages) == pytest.approx(residual / bias.slope, rel=1e-6)


def test_beheshti_and_de_lange_are_the_same_map(some):
    predicted, ages = some
    both = [BiasCorrection.fit(predicted, ages, m) for m in ("beheshti", "delange")]
    a, b = (bias.apply(predicted, ages) for bias in both)
    assert np.allclose(a, b)


def test_an_offset_needs_one_scan():
    bias = BiasCorrection.fit([50.0], [44.0], "offset")
    assert bias.apply(np.array([50.0, 30.0])).tolist() == [44.0, 24.0]


def test_refusals(some):
    predicted, ages = some
    with pytest.raises(CalibrationError, match="3 labelled scans or more, got 2"):
        BiasCorrection.fit([1.0, 2.0], [1.0, 2.0])
    with pytest.raises(CalibrationError, match=r"span 0\.0 years"):
        BiasCorrection.fit([40.0, 42, 44], [50.0, 50, 50])
    with pytest.raises(CalibrationError, match="use offset"):
        BiasCorrection.fit(50 + 0 * ages, ages)
    with pytest.raises(CalibrationError, match="valid are"):
        BiasCorrection.fit(predicted, ages, "smith")
    with pytest.raises(CalibrationError, match="true age"):
        BiasCorrection.fit(predicted, ages, "delange").apply(predicted)
    with pytest.raises(CalibrationError, match="one of each per scan"):
        Conformal.fit([1.0], [1.0, 2.0])


def test_intervals_cover_nine_in_ten():
    rng = np.random.default_rng(1)
    ages = rng.uniform(20, 80, 4000)
    predicted = ages + rng.laplace(0, 5, 4000)
    conformal = Conformal.fit(predicted[:120], ages[:120])
    intervals = conformal.interval(predicted[120:])
    assert 0.85 < coverage(intervals, ages[120:]) < 0.95


def test_the_quantile_is_the_right_order_statistic():
    residuals = np.arange(1, 51) * 0.5
    predicted = np.full(50, 50.0)
    interval = Conformal.fit(predicted, predicted - residuals).interval([60.0])
    wanted = residuals[int(np.ceil(51 * 0.9)) - 1]
    assert interval[0].tolist() == pytest.approx([60 - wanted, 60 + wanted])


def test_too_few_residuals_for_the_confidence():
    with pytest.raises(CalibrationError, match="10 residuals or more, got 3"):
        Conformal((1.0, 2.0, 3.0)).interval([40.0])
    with pytest.raises(CalibrationError, match="between 0 and 1"):
        Conformal((1.0,) * 20).interval([40.0], confidence=90)


def test_a_damaged_calibration_is_refused_and_an_old_one_read(tmp_path):
    file = tmp_path / "a.json"
    calibration = Calibration({"a": BiasCorrection("cole", 0.8, 10.25, 30)}, "ab" * 32)
    calibration.save(file)
    assert Calibration.load(file) == calibration
    whole = file.read_bytes()
    for at in range(len(whole)):
        for bit in range(8):
            damaged = bytearray(whole)
            damaged[at] ^= 1 << bit
            file.write_bytes(damaged)
            try:
                found = Calibration.load(file)
            except CalibrationError:
                continue
            assert found == calibration
    file.write_bytes(whole.replace(b"10.25", b"10.75"))
    with pytest.raises(
        CalibrationError, match=r"a\.json: the calibration is damaged.*fit it again"
    ):
        Calibration.load(file)
    old = json.loads(whole)
    del old[SEAL]
    file.write_text(json.dumps(old))
    assert Calibration.load(file) == calibration
