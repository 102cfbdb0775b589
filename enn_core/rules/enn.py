"""Eigen networks end to end: exactly orthonormal (ours) and by the paper's penalty."""

from __future__ import annotations

from functools import partial
from typing import Any

from torch import Tensor, nn

from enn_core.convert import to_enn
from enn_core.local import adamw
from enn_core.rules.backprop import one_block
from enn_core.rules.base import TrainerRule


def enn(
    model: nn.Module,
    example: Tensor,
    classes: int,
    *,
    lr: float,
    steps: int,
    seed: int = 0,
    weight_decay: float = 1e-2,
    retract_every: int = 1,
    **training: Any,
) -> TrainerRule:
    """Exact ENN: the factors are retracted after optimizer steps."""
    return one_block(
        to_enn(model, inplace=True),
        partial(adamw, lr=lr, weight_decay=weight_decay),
        steps=steps,
        seed=seed,
        retract_every=retract_every,
        **training,
    )


def enn_penalty(
    model: nn.Module,
    example: Tensor,
    classes: int,
    *,
    lr: float,
    steps: int,
    seed: int = 0,
    weight_decay: float = 1e-2,
    penalty: float = 2e-4,
    **training: Any,
) -> TrainerRule:
    """The paper's ENN: orthonormality as a term of the loss."""
    return one_block(
        to_enn(model, inplace=True),
        partial(adamw, lr=lr, weight_decay=weight_decay),
        steps=steps,
        seed=seed,
        penalty=penalty,
        **training,
    )
