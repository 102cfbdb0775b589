"""Mono-Forward: every layer learns from its own projection of its activities to the classes."""

from __future__ import annotations

from functools import partial
from typing import Any, cast

from torch import Tensor, nn

from enn_core.cuts import measure, units
from enn_core.local import LocalBlock, adamw
from enn_core.rules.base import TrainerRule, seeded, train_blocks


def mono_forward(
    model: nn.Module,
    example: Tensor,
    classes: int,
    *,
    lr: float,
    steps: int,
    seed: int = 0,
    weight_decay: float = 1e-2,
    **training: Any,
) -> TrainerRule:
    """Layer by layer, `cross_entropy(a_i M_i^T, y)`; the model's own last map is the last `M`.

    A layer is a part of the finest cut (a residual block, in a network of such).
    """
    parts = units(model, example)
    shapes = [cost.shape for cost in measure(parts, example, repeats=0)]
    made = []
    with seeded(example, seed):
        for part, shape in zip(parts, shapes, strict=True):
            shape = cast(tuple[int, ...], shape)
            if part is parts[-1] and shape == (len(example), classes):
                made.append(LocalBlock(part, nn.Identity()))
            else:
                weight = next(part.parameters())
                head = Projection(shape, classes).to(weight.device, weight.dtype)
                made.append(LocalBlock(part, head))
    optimizer = partial(adamw, lr=lr, weight_decay=weight_decay)
    return train_blocks(made, optimizer, steps=steps, seed=seed, **training)


class Projection(nn.Sequential):
    """Goodness of every class, `G = a M^T`, of activities a (N, ...) as vectors.

    Gong et al. 2025, arXiv 2501.09238.
    """

    def __init__(self, shape: tuple[int, ...], classes: int) -> None:
        size = 1
        for side in shape[1:]:
            size *= side
        super().__init__(nn.Flatten(), nn.Linear(size, classes, bias=False))
