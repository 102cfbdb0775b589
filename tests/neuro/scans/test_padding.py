"""Padding far below 0 is told from a CT, also where it was interpolated."""

from __future__ import annotations

import numpy as np
import pytest
from scipy.ndimage import gaussian_filter, zoom
from volume_cases import DATA, needs_heads, write

from neuro.scans.padding import padding
from neuro.scans.read import VolumeError, read_volume

SHAPE = (64, 76, 64)
AFFINE = np.diag([3.0, 3, 3, 1])
RNG = np.random.default_rng(0)


def shells() -> np.ndarray:
    """How far voxels are from the middle, 1 at the skin."""
    middle = np.array(SHAPE)[:, None, None, None] / 2
    sides = np.array([26, 32, 27])[:, None, None, None]
    return np.sqrt((((np.indices(SHAPE) - middle) / sides) ** 2).sum(0))


def mr(bright: float = 900) -> np.ndarray:
    """White and grey matter, a dark skull, a bright scalp, and noise around."""
    r = shells()
    values = np.select([r < 0.5, r < 0.8, r < 0.9, r < 1], [0.8, 0.55, 0.1, 1.0], 0.0) * bright
    return np.abs(gaussian_filter(values, 0.7) + RNG.normal(0, 0.02 * bright, SHAPE))


def ct(*, fat: bool = False, noise: float = 0) -> np.ndarray:
    r = shells()
    values = np.full(SHAPE, -1000.0) + RNG.normal(0, 1, SHAPE) * noise
    for outer, low, high in (
        (1, -120, -60) if fat else (1, 0, 80),
        (0.93, 300, 1500),
        (0.8, 0, 80),
    ):
        values[r < outer] = RNG.uniform(low, high, SHAPE)[r < outer]
    return values


def padded(values: np.ndarray, low: float, way: str) -> np.ndarray:
    values = values.copy()
    if way == "frame":
        return np.pad(values, 8, constant_values=low)
    if way == "slab":
        values[:8] = values[:, :, -6:] = low
    else:
        values[shells() > 1] = low
    return values


@pytest.mark.parametrize("order", [0, 1, 3])
@pytest.mark.parametrize("low", [-1000, -1024, -2000])
@pytest.mark.parametrize("way", ["frame", "slab", "masked"])
def test_interpolated_padding_is_padding(way, low, order):
    for bright in (60, 4000):
        values = zoom(padded(mr(bright), low, way), 0.9, order=order).astype(np.float32)
        found = padding(values)
        assert found == pytest.approx(low, rel=0.02), bright


@pytest.mark.parametrize("kind", [{}, {"fat": True}, {"noise": 10}, {"noise": 60}])
def test_a_ct_is_a_ct(kind):
    for values in (ct(**kind), zoom(ct(**kind), 0.9, order=1), zoom(ct(**kind), 0.9, order=3)):
        assert padding(values.astype(np.float32)) is None


def test_a_ct_is_refused(tmp_path):
    with pytest.raises(VolumeError, match="CT"):
        read_volume(write(tmp_path / "a.nii.gz", ct().astype(np.int16), AFFINE))


@pytest.mark.parametrize("order", [1, 3])
def test_what_is_read_of_a_padded_image(tmp_path, order):
    values = zoom(padded(mr(), -1024, "frame"), 0.9, order=order).astype(np.float32)
    volume = read_volume(write(tmp_path / "a.nii.gz", values, AFFINE))
    assert volume.voxels.min() == 0
    assert np.array_equal(volume.voxels, np.maximum(values, 0))
    assert volume.notes == ("The background of -1024 is padding, set to 0.",)


@needs_heads
@pytest.mark.parametrize("way", ["frame", "slab"])
def test_real_heads(way):
    path = sorted((DATA / "ixi_hh" / "heads_2mm").glob("*.nii.gz"))[0]
    head = read_volume(path).voxels
    if way == "frame":
        head = np.pad(head, 8, constant_values=-1000)
    else:
        head[:8] = -1000
    assert padding(zoom(head, 0.9, order=3)) == pytest.approx(-1000, rel=0.02)
