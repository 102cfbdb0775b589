"""Light augmentation of registered brains, by MONAI, drawn once and kept as views.

A registered brain varies little: two degrees, two percent of size, a little contrast. Views are
made before training (about 0.1 s each), not within it: the same views serve every fold, rule and
seed, and a step of training costs what the network costs.

>>> import numpy as np
>>> brain = np.zeros((20, 24, 20), np.uint8)
>>> brain[5:15, 6:18, 5:15] = 150
>>> views(brain, "sub-01", 3).shape
(3, 20, 24, 20)
"""

from __future__ import annotations

import hashlib
from typing import Any

import numpy as np

from neuro.scans.preprocess import to_uint8
from neuro.scans.template import FULL_SCALE

__all__ = ["augmentation", "views"]

_DEGREES, _SCALE, _VOXELS = 2.0, 0.02, 1.0


def augmentation(seed: int) -> Any:
    """MONAI transform of brains (1, i, j, k), float32, 0 outside: affine, contrast, bias field.

    Args:
        seed: of its random draws.
    """
    from monai.transforms import Compose, RandAdjustContrast, RandAffine, RandBiasField

    angle = np.deg2rad(_DEGREES)
    transform = Compose(
        [
            RandAffine(
                prob=1.0,
                rotate_range=(angle, angle, angle),
                scale_range=(_SCALE, _SCALE, _SCALE),
                translate_range=(_VOXELS, _VOXELS, _VOXELS),
                mode="bilinear",
                padding_mode="zeros",
            ),
            RandAdjustContrast(prob=0.5, gamma=(0.92, 1.09)),
            RandBiasField(prob=0.3, degree=2, coeff_range=(0.0, 0.05)),
        ]
    )
    transform.set_random_state(seed)
    return transform


def views(volume: np.ndarray, subject: str, count: int) -> np.ndarray:
    """The volume itself and `count - 1` variations of it, the same ones at every call.

    Args:
        volume: (i, j, k) uint8, 0 outside the brain.
        subject: which the random draws depend on.
        count: how many.

    Returns:
        (count, i, j, k) uint8, each with its 99th percentile at `FULL_SCALE`.
    """
    if count < 1:
        raise ValueError(f"got {count} views, give 1 (the volume itself) or more")
    made = np.empty((count, *volume.shape), np.uint8)
    made[0] = volume
    if count == 1:
        return made
    import torch

    seed = int.from_bytes(hashlib.sha256(subject.encode()).digest()[:4], "big")
    transform = augmentation(seed)
    scaled = torch.from_numpy(volume.astype(np.float32) / FULL_SCALE)[None]
    for view in made[1:]:
        view[:] = to_uint8(np.asarray(transform(scaled))[0])
    return made
