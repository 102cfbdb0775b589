"""Synthetic scanners: real, registered brains as another site would show them, by MONAI.

A site changes every brain in the same way (its contrast, its coil, its resolution) besides noise,
which is drawn for each brain. Strengths: "reported" are those of the benchmark, "development"
those that constants were chosen with; they share no value. The former were set so that each site
adds three years of error at least, by the error of untaught networks alone.
"""

from __future__ import annotations

import hashlib
from typing import Any

import numpy as np

from neuro.scans.preprocess import to_uint8
from neuro.scans.template import FULL_SCALE

__all__ = ["SITES", "seen_at"]

# Site -> strength -> settings. `bias` has a seed: the field is the site's.
SITES: dict[str, dict[str, dict[str, Any]]] = {
    "contrast": {
        "development": {"gamma": 1.4},
        "reported": {"gamma": 0.8},
    },
    "bias field": {
        "development": {"bias": (0.25, 2)},
        "reported": {"bias": (0.2, 1)},
    },
    "resolution": {
        "development": {"zoom": 0.38},
        "reported": {"zoom": 0.42},
    },
    "noise": {
        "development": {"noise": 0.12},
        "reported": {"noise": 0.11},
    },
    "mixed": {
        "development": {"gamma": 0.88, "bias": (0.15, 3), "zoom": 0.65, "noise": 0.06},
        "reported": {"gamma": 1.2, "bias": (0.15, 6), "zoom": 0.6, "noise": 0.05},
    },
}


def seen_at(volume: np.ndarray, subject: str, settings: dict[str, Any]) -> np.ndarray:
    """A brain as a site shows it, scaled as every prepared brain is.

    Args:
        volume: (i, j, k) uint8, 0 outside the brain.
        subject: which the noise depends on.
        settings: of `SITES`.

    Returns:
        (i, j, k) uint8.
    """
    from monai.transforms import Compose, RandAdjustContrast, RandBiasField, RandRicianNoise
    from monai.transforms import RandSimulateLowResolution as LowResolution

    steps: list[Any] = []
    if "gamma" in settings:
        steps.append(RandAdjustContrast(prob=1.0, gamma=(settings["gamma"],) * 2))
    if "bias" in settings:
        strength, seed = settings["bias"]
        field = RandBiasField(prob=1.0, degree=3, coeff_range=(-strength, strength))
        steps.append(field.set_random_state(seed))
    if "zoom" in settings:
        steps.append(LowResolution(prob=1.0, zoom_range=(settings["zoom"],) * 2))
    if "noise" in settings:
        own = int.from_bytes(hashlib.sha256(subject.encode()).digest()[:4], "big")
        noise = RandRicianNoise(prob=1.0, std=settings["noise"], sample_std=False)
        steps.append(noise.set_random_state(own))
    brain = np.asarray(Compose(steps)(volume[None].astype(np.float32) / FULL_SCALE))[0]
    return to_uint8(np.where(volume > 0, np.maximum(brain, 1e-3), 0).astype(np.float32))
