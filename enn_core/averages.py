"""Averages of orthonormal factors are not orthonormal, and those who evaluate them are told.

The mean of several orthonormal matrices is a contraction: in EMA, SWA and schedule-free averages
the columns of `Q` and `P` are shorter, and the weight between them is too small. `Retraction` holds
the layers that are trained; averages lie in copies of them, or are swapped into them. Of others
nothing is told: factors that were trained freely must not be retracted.
"""

from __future__ import annotations

import warnings
from uuid import uuid4

import torch
from torch import Tensor, nn

from enn_core.factors import gram_error, in_working_precision, relative_size

# Error from which copies of held layers are told of: above what half precision makes of orthonormal
# columns.
_APART = 1e-2
# For held layers, which drift between two retractions: what the squared lengths of columns lost on
# average, and what share of that the longest column may have gained. Steps make columns longer.
_LOST = 5e-2
_GAINED = 0.2

_held: set[int] = set()  # lineages


class Copyable:
    """A layer that knows whether it, or what it is a copy of, is held by a `Retraction`."""

    is_held = False
    """Whether this very layer is; copies forget it."""
    _lineage: int | None = None

    def lineage(self) -> int:
        """What a layer has in common with its copies alone."""
        if self._lineage is None:
            self._lineage = uuid4().int
        return self._lineage

    def hold(self, held: bool = True) -> None:
        self.is_held = held
        (_held.add if held else _held.discard)(self.lineage())

    def has_held_kin(self) -> bool:
        """Whether it or another one of its lineage is held in this process."""
        return self._lineage in _held


def keep_as_they_are(average: nn.Module) -> None:
    """Let a copied model be evaluated without a word, averaged factors and all."""
    for layer in average.modules():
        if isinstance(layer, Copyable):
            layer._lineage = None


@torch.no_grad()
def warn_if_averaged(Q: Tensor, P: Tensor, *, is_held: bool) -> None:
    """Warn, as `warnings` does once, if factors look like averages of orthonormal ones.

    Args:
        Q, P: (..., n, r) of a layer.
        is_held: whether the layer is one that `Retraction` holds, not a copy of one.
    """
    if Q.is_cuda and torch.cuda.is_current_stream_capturing():
        return  # nothing may be looked at now
    with torch.autocast(Q.device.type, enabled=False):
        factors = [in_working_precision(factor) for factor in (Q, P)]
        if not (_are_shorter(factors) if is_held else _are_apart(factors)):
            return
    warnings.warn(
        "Q and P of an eigen layer that is evaluated are not orthonormal, as averages of them are "
        "not (EMA, SWA, schedule-free); call retract_(model) on an averaged model first",
        stacklevel=2,
    )


def _are_apart(factors: list[Tensor]) -> bool:
    return any(bool(relative_size(gram_error(each)).max() > _APART) for each in factors)


def _are_shorter(factors: list[Tensor]) -> bool:
    lengths = [each.square().sum(-2) for each in factors]
    lost = 1 - torch.stack([each.mean() for each in lengths]).min()
    gained = torch.stack([each.max() for each in lengths]).max() - 1
    return bool((lost > _LOST) & (gained <= _GAINED * lost))
