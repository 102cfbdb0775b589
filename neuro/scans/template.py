"""The space that all brains are brought to: nilearn's MNI152 template with voxels of 2 mm."""

from __future__ import annotations

import functools

import numpy as np

__all__ = ["FULL_SCALE", "MNI_AFFINE", "MNI_SHAPE", "load_template"]

MNI_SHAPE = (99, 117, 95)
"""Voxels i, j, k along the axes "RAS"."""

MNI_AFFINE = np.array([[2.0, 0, 0, -98], [0, 2, 0, -134], [0, 0, 2, -72], [0, 0, 0, 1]])
"""Voxel indices of that grid -> mm in MNI space."""

FULL_SCALE = 200
"""Value (uint8) of the 99th percentile of a brain's intensities; 0 is outside the brain."""


@functools.cache
def load_template() -> tuple[np.ndarray, np.ndarray]:
    """The template's brain (float32, 0 outside) and its mask (bool), both of `MNI_SHAPE`."""
    from nilearn.datasets import load_mni152_brain_mask, load_mni152_template

    mask = np.asarray(load_mni152_brain_mask(resolution=2).dataobj) > 0
    image = load_mni152_template(resolution=2)
    if image.shape != MNI_SHAPE or not np.allclose(image.affine, MNI_AFFINE):
        raise RuntimeError(f"nilearn's template has the shape {image.shape}, expected {MNI_SHAPE}")
    brain = np.where(mask, image.get_fdata(dtype=np.float32), np.float32(0))
    brain.setflags(write=False)
    mask.setflags(write=False)
    return brain, mask
