"""Values far below 0: the Hounsfield units of a CT, or padding around an MR image.

>>> rest = np.full((30, 30, 30), -1000.0)
>>> rest[8:22, 8:22, 8:22] = 300.0
>>> padding(rest)
-1000.0
"""

from __future__ import annotations

import numpy as np

__all__ = ["CT_LOW", "padding"]

CT_LOW = -500
"""Hounsfield units below which air lies."""
# Below it lies fat; in an MR image, hardly anything.
_FAT = -20
_FAT_SHARE = 0.05

# Of the values far below 0, so many are within this share of one value where they are padding.
_ONE_VALUE, _NEAR = 0.5, 0.02
# Voxels about the padding that interpolation has mixed with it, or made to ring.
_EDGE = 4

# Hounsfield units of soft tissue, and of bone from the last one on; little lies between.
_SOFT, _BONE = (-150, 100), 300
_SOFT_SHARE, _BONE_SHARE = 0.4, 0.02
# Voxels that are enough to tell where these lie.
_SAMPLE = 2e6


def padding(values: np.ndarray) -> float | None:
    """The value that an image was padded with; None if these are the Hounsfield units of a CT.

    Padding is one value, up to its edges where it was interpolated, around an image that has hardly
    anything below 0 and that is not made as a head in a CT is.

    Args:
        values: (I, J, K) with some below `CT_LOW`.
    """
    from scipy.ndimage import binary_dilation

    far = values < CT_LOW
    # Of the deepest there are many more than of what lies between them and the image.
    low = float(np.median(values[far]))
    if np.mean(np.abs(values[far] - low) <= _NEAR * -low) < _ONE_VALUE:
        return None
    inside = ~binary_dilation(far, iterations=_EDGE)
    if not inside.any():
        inside = ~far
        if not inside.any():
            return None
    if np.mean(values[inside] < _FAT) >= _FAT_SHARE or _is_ct_head(values, inside):
        return None
    # A spline's overshoot may have moved the median by its last digits.
    return round(low, 2)


def _is_ct_head(values: np.ndarray, inside: np.ndarray) -> bool:
    """Whether soft tissue of 0 to 80 lies within bone of 300 and more.

    An MR image may have such values too, but what is dark in it, the air, lies outside.
    """
    step = int(np.ceil((values.size / _SAMPLE) ** (1 / 3)))
    values, inside = values[::step, ::step, ::step], inside[::step, ::step, ::step]
    soft = inside & (values > _SOFT[0]) & (values < _SOFT[1])
    bone = inside & (values > _BONE)
    count = int(inside.sum())
    if soft.sum() < _SOFT_SHARE * count or bone.sum() < _BONE_SHARE * count:
        return False
    middle = np.median(np.argwhere(inside), axis=0)
    radii = [np.median(np.linalg.norm(np.argwhere(one) - middle, axis=1)) for one in (soft, bone)]
    return bool(radii[1] > radii[0])
