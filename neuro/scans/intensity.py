"""How bright a brain is: the value that its intensities are scaled by, whatever shines in it.

>>> import numpy as np
>>> values = np.linspace(50, 100, 10_001)
>>> round(white_level(values), 1)                         # the 99th percentile
99.5
>>> values[:150] = 500                                    # 1.5 % of it shine
>>> round(white_level(values), 1)
99.7
"""

from __future__ import annotations

import numpy as np

__all__ = ["bright_excess", "white_level"]

_PERCENTILE = 99
# A voxel shines from the lower of 1.5 times the 75th and 1.3 times the 90th percentile on, wholly
# from 1.1 times that. The 99th percentile of 151 IXI brains lies at 0.85 to 0.91 of that value, of
# 18 old brains from another scanner at up to 0.97: benchmarks/brain_scan_checks.py.
_SHINES = ((75, 1.5), (90, 1.3))
_RAMP = 0.1
# This share may shine, as vessels do (of these brains at most 0.003); of twice that all else is
# left out.
_USUAL = 0.004


def white_level(inside: np.ndarray) -> float:
    """The 99th percentile of a brain's values, without those that shine.

    Of a brain as brains are this is the 99th percentile itself. Where more shines than in any
    brain that was measured (a contrast agent, an artefact), it goes over to the percentile of the
    rest, by and by: nothing jumps.

    Args:
        inside: (n,) values above 0, n at least 1.
    """
    plain = np.percentile(inside, _PERCENTILE)
    excess = bright_excess(inside)
    if excess <= 0:
        return float(plain)
    start = _start(inside)
    shining = int(np.count_nonzero(inside > start))
    left_out = max(0, shining - int(_USUAL * inside.size))
    rest = np.partition(inside, inside.size - left_out - 1)[: inside.size - left_out]
    share = min(1.0, excess / _USUAL)
    return float((1 - share) * plain + share * np.percentile(rest, _PERCENTILE))


def bright_excess(inside: np.ndarray) -> float:
    """Share of a brain's values that shine beyond what is usual, from 0 to 1.

    Args:
        inside: (n,) values above 0, n at least 1; scaled and clipped ones do as well.
    """
    start = _start(inside)
    shining = np.clip((inside[inside > start] / start - 1) / _RAMP, 0, 1)
    return max(0.0, float(shining.sum(dtype=np.float64)) / inside.size - _USUAL)


def _start(inside: np.ndarray) -> float:
    levels = np.percentile(inside, [percentile for percentile, _ in _SHINES])
    return float(min(level * by for level, (_, by) in zip(levels, _SHINES, strict=True)))
