"""Networks cut into blocks that learn from their own heads: ENN-l, and DGL on plain weights."""

from __future__ import annotations

from functools import partial
from typing import Any

from torch import Tensor, nn

from enn_core.convert import to_enn
from enn_core.cuts import By, local_blocks
from enn_core.heads import Form
from enn_core.local import LocalBlock, adamw
from enn_core.rules.base import TrainerRule, seeded, train_blocks

BLOCKS = 4


def dgl(
    model: nn.Module,
    example: Tensor,
    classes: int,
    *,
    lr: float,
    steps: int,
    seed: int = 0,
    weight_decay: float = 1e-2,
    blocks: int = BLOCKS,
    head: Form = "conv",
    by: By = "memory",
    **training: Any,
) -> TrainerRule:
    """Greedy decoupled blocks with plain weights."""
    made = blocks_with_heads(model, example, classes, seed, blocks, head, by)
    optimizer = partial(adamw, lr=lr, weight_decay=weight_decay)
    return train_blocks(made, optimizer, steps=steps, seed=seed, **training)


def local_enn(
    model: nn.Module,
    example: Tensor,
    classes: int,
    *,
    lr: float,
    steps: int,
    seed: int = 0,
    weight_decay: float = 1e-2,
    blocks: int = BLOCKS,
    head: Form = "conv",
    by: By = "memory",
    retract_every: int = 1,
    penalty: float = 0.0,
    **training: Any,
) -> TrainerRule:
    """ENN-l with exact retraction; `retract_every=0, penalty=2e-4` is the paper's."""
    made = blocks_with_heads(model, example, classes, seed, blocks, head, by)
    for block in made:
        to_enn(block.block, inplace=True)  # after the cut, which then equals DGL's
    optimizer = partial(adamw, lr=lr, weight_decay=weight_decay)
    return train_blocks(
        made,
        optimizer,
        steps=steps,
        seed=seed,
        retract_every=retract_every,
        penalty=penalty,
        **training,
    )


def blocks_with_heads(
    model: nn.Module,
    example: Tensor,
    classes: int,
    seed: int,
    blocks: int,
    head: Form,
    by: By,
) -> list[LocalBlock]:
    """Blocks of like cost with heads that depend on the seed alone."""
    with seeded(example, seed):
        return local_blocks(model, example, blocks, by=by, head=head, outputs=classes)
