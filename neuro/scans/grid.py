"""The grid that the networks see: a cut of the template's grid, and volumes as their input."""

from __future__ import annotations

import numpy as np

from neuro.scans.read import VolumeError
from neuro.scans.template import FULL_SCALE, MNI_SHAPE

__all__ = ["GRID", "ORIGIN", "as_input", "crop", "uncrop"]

GRID = (80, 96, 80)
"""Voxels i, j, k (RAS, 2 mm) that a network sees."""

ORIGIN = (9, 11, 0)
"""First voxel of `GRID` on the template's grid, `MNI_SHAPE`."""


def as_input(volumes: np.ndarray) -> np.ndarray:
    """uint8 volumes (n, i, j, k) -> network input (n, 1, i, j, k), float32, about 0 to 1."""
    return volumes[:, None].astype(np.float32) / FULL_SCALE


def crop(volume: np.ndarray) -> np.ndarray:
    """Cut `GRID` out of a volume on the template's grid; the rest holds next to no brain.

    Raises:
        VolumeError: the volume is on another grid.
    """
    if volume.shape == GRID:
        return volume
    if volume.shape != MNI_SHAPE:
        raise VolumeError(
            f"got a volume of shape {volume.shape}, expected {MNI_SHAPE} (MNI152, 2 mm) or {GRID}; "
            "run `enn brain preprocess` first"
        )
    return volume[tuple(slice(o, o + g) for o, g in zip(ORIGIN, GRID, strict=True))]


def uncrop(volume: np.ndarray) -> np.ndarray:
    """A volume of `GRID` on the template's grid, 0 where `crop` cut."""
    whole = np.zeros(MNI_SHAPE, volume.dtype)
    whole[tuple(slice(o, o + g) for o, g in zip(ORIGIN, GRID, strict=True))] = volume
    return whole
