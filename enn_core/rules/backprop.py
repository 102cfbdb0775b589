"""End-to-end backpropagation: a `LocalTrainer` of one block, with any optimizer or penalty."""

from __future__ import annotations

from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from enn_core.local import LocalBlock, MakeOptimizer, adamw
from enn_core.orthogonality import param_groups
from enn_core.rules.base import TrainerRule, train_blocks


def one_block(
    model: nn.Module, optimizer: MakeOptimizer, *, steps: int, seed: int, **training: Any
) -> TrainerRule:
    """The whole model as one block."""
    block = LocalBlock(model, nn.Identity())
    return train_blocks([block], optimizer, steps=steps, seed=seed, **training)


def backprop_adamw(
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
    """AdamW; no decay of biases and norms."""
    optimizer = partial(adamw, lr=lr, weight_decay=weight_decay)
    return one_block(model, optimizer, steps=steps, seed=seed, **training)


def backprop_sgd(
    model: nn.Module,
    example: Tensor,
    classes: int,
    *,
    lr: float,
    steps: int,
    seed: int = 0,
    weight_decay: float = 5e-4,
    momentum: float = 0.9,
    **training: Any,
) -> TrainerRule:
    """Stochastic gradient descent with momentum."""
    optimizer = partial(sgd, lr=lr, weight_decay=weight_decay, momentum=momentum)
    return one_block(model, optimizer, steps=steps, seed=seed, **training)


def sgd(
    block: nn.Module, lr: float, weight_decay: float = 5e-4, momentum: float = 0.9
) -> torch.optim.SGD:
    """SGD over `param_groups`: no decay of bases, biases and norms."""
    groups = param_groups(block, weight_decay=weight_decay)
    return torch.optim.SGD(groups, lr=lr, momentum=momentum)
