"""Learning rates over a run."""

from __future__ import annotations

import math

_WARM_UP = 0.05  # of the steps


def warm_up_cosine(step: int, steps: int) -> float:
    """Share of the highest rate at a step: linear over 5 % of the steps, then half a cosine to 0.

    Args:
        step: from 0.
        steps: of the whole run, at least 1.
    """
    rising = max(1, round(_WARM_UP * steps))
    if step < rising:
        return (step + 1) / rising
    done = min(1.0, (step - rising + 1) / max(1, steps - rising + 1))
    return 0.5 * (1 + math.cos(math.pi * done))
