"""Grey against white: is a brain T1-weighted, and as the shipped model's training scans were?

A power law on the intensities (a gamma, another sequence, another filter of the scanner) leaves a
brain looking as it did and moves its age by years. Along the direction in which such a power moves
the intensities of regions and their quantiles, training scans differ little from each other:
`deviation` is a brain's place along it.

>>> from neuro.scans.template import load_template
>>> image = np.rint(load_template()[0] * 200).astype(np.uint8)
>>> white_to_grey(image) > LEAST_WHITE_TO_GREY
True
"""

from __future__ import annotations

import functools

import numpy as np

from neuro.scans.template import FULL_SCALE, load_template

__all__ = [
    "FITTED_TO",
    "LEAST_WHITE_TO_GREY",
    "LIMIT",
    "contrast_features",
    "deviation",
    "white_to_grey",
]

LEAST_WHITE_TO_GREY = 1.05
"""`white_to_grey` of T1-weighted brains is above this. Of 151 IXI brains it is 1.16 to 1.29, of 18
old ones from another scanner 1.08 to 1.36; of made PD-, T2-like and inverted brains up to 1.03."""

# The template's brain is cut where its values are these shares of it, and at these depths in
# voxels: 28 regions, of which those of more than `_LEAST` voxels are looked at.
_SHARES = (0.06, 0.15, 0.3, 0.5, 0.7, 0.85)
_DEPTHS = (3, 7, 12)
_LEAST = 1500
_QUANTILES = (5, 10, 25, 50, 75, 90, 95)
_DARK = FULL_SCALE // 10

# --- from `python benchmarks/brain_scan_checks.py --fit`, on the 151 IXI brains that the shipped
# model was trained on
FITTED_TO = "fcd075fc0d560ddfc603510c7450ec84d40282e33f71887f72dbcbc22dcf2abd"
"""`weights_sha256` of the model whose training scans these numbers describe."""

LIMIT = 2.0
"""Of `deviation`. 2.6 % of the 151 training scans are farther, 8.6 % when they were left out of the
fit; of these 89 % are at a gamma of 0.9, 86 % at 1.1 and all at 0.8 and 1.25. 2.2 would leave 4.6 %
of ordinary brains, and miss a gamma of 0.9 that moves a brain's age by 6.5 years (it lies at 2.1).
"""

_MEAN = (
    *(-0.9465, -0.6946, -0.6269, -0.6944, -0.8500, -0.5503, -0.4547, -0.4254),
    *(-0.6704, -0.4356, -0.3752, -0.3414, -0.6564, -0.4508, -0.3542, -0.2865),
    *(-0.6769, -0.4524, -0.3029, -0.1850, -0.4795, -0.2891, -0.1521, -0.4314),
    *(-0.2763, -0.1811, -1.4603, -1.1357, -0.7093, -0.4372, -0.2438, -0.1264),
    -0.0740,
)
_WEIGHTS = (
    *(-3.5567, 1.3914, -0.3432, -3.3673, -0.0946, 14.4735, -11.8671, 3.8652),
    *(3.5010, -30.9952, -1.6046, -19.8916, -7.1427, -46.2820, -9.5858, 34.4386),
    *(1.5497, -15.4211, 11.9691, 15.7148, -9.0311, 1.9500, -13.5586, -1.4114),
    *(-1.7288, -5.0468, -5.5117, 0.8645, 17.1190, -3.7178, 8.6148, 15.1735),
    46.8392,
)
# ---


def white_to_grey(image: np.ndarray) -> float:
    """Median value where the template is white over that where it is grey; NaN if that is 0.

    Args:
        image: (99, 117, 95) uint8, as `Prepared.image`.
    """
    white, grey = (float(np.median(image[where])) for where in _tissues())
    return white / grey if grey > 0 else float("nan")


def contrast_features(image: np.ndarray) -> np.ndarray:
    """Logarithms of the median values of regions and of quantiles, 0 at `FULL_SCALE`.

    Args:
        image: (99, 117, 95) uint8, cropped as training sets are (`neuro.scans.grid`).

    Returns:
        (33,) float64; a power law on the intensities multiplies them.
    """
    medians = [np.median(image[where]) for where in _regions()]
    inside = image[image > _DARK]
    quantiles = np.percentile(inside, _QUANTILES) if inside.size else np.ones(len(_QUANTILES))
    return np.log(np.maximum([*medians, *quantiles], 1.0) / FULL_SCALE)


def deviation(image: np.ndarray) -> float:
    """How far a brain lies from the training scans of `FITTED_TO`, in their standard deviations.

    Args:
        image: as `contrast_features` takes it.

    Returns:
        Below 0: flatter, as by a gamma below 1; above 0: steeper.
    """
    return float((contrast_features(image) - np.array(_MEAN)) @ np.array(_WEIGHTS))


@functools.cache
def _tissues() -> tuple[np.ndarray, np.ndarray]:
    """Masks of the template's white and grey matter, away from their borders."""
    from scipy import ndimage

    brain, mask = load_template()
    share = brain / np.percentile(brain[mask], 99)
    inner = ndimage.binary_erosion(mask, iterations=2)
    white = ndimage.binary_erosion((share > 0.87) & inner)
    return white, inner & (share > 0.70) & (share < 0.767)


@functools.cache
def _regions() -> tuple[np.ndarray, ...]:
    """Masks of the template's brain by value and depth."""
    from scipy import ndimage

    brain, mask = load_template()
    value = np.digitize(brain, np.quantile(brain[mask], _SHARES))
    depth = np.digitize(ndimage.distance_transform_edt(mask), _DEPTHS)
    parts = (
        mask & (value == v) & (depth == d)
        for v in range(len(_SHARES) + 1)
        for d in range(len(_DEPTHS) + 1)
    )
    return tuple(part for part in parts if part.sum() > _LEAST)
