"""Direct feedback alignment: the error of the answer reaches every layer by fixed random weights.

No gradient passes from layer to layer. The layers learn by the loop of `LocalTrainer`: the inner
product of a layer's activities and its feedback has the feedback as its gradient.
"""

from __future__ import annotations

from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from enn_core.cuts import measure
from enn_core.local import LocalBlock, adamw
from enn_core.rules.base import TrainerRule, seeded, train_blocks
from enn_core.rules.chains import layers_of


def dfa(
    model: nn.Module,
    example: Tensor,
    classes: int,
    *,
    lr: float,
    steps: int,
    seed: int = 0,
    weight_decay: float = 1e-2,
    **training: Any,
) -> DirectFeedback:
    """Layer i moves against `B_i e` through its own activation alone; e is softmax less one-hot."""
    parts = layers_of(model)
    made = [LocalBlock(part, nn.Identity()) for part in parts]
    shapes = [cost.shape for cost in measure(parts, example, repeats=0)]
    with seeded(example, seed):
        for block, shape in zip(made[:-1], shapes, strict=False):
            block.head = Feedback(tuple(shape or ()), classes).to(example.device)
    optimizer = partial(adamw, lr=lr, weight_decay=weight_decay)
    rule = train_blocks(made, optimizer, steps=steps, seed=seed, task=aligned, **training)
    return DirectFeedback(rule.trainer, rule.blocks)


class Feedback(nn.Module):
    """Fixed random map B (size, classes), applied backwards: activities (N, ...) to (N, classes).

    Args:
        shape: of the activities.
        classes: length of the error.
    """

    B: Tensor

    def __init__(self, shape: tuple[int, ...], classes: int) -> None:
        super().__init__()
        size = torch.Size(shape[1:]).numel()
        self.register_buffer("B", torch.randn(size, classes) / classes**0.5)

    def forward(self, h: Tensor) -> Tensor:
        return h.flatten(1) @ self.B


def aligned(prediction: Tensor, target: tuple[Tensor, Tensor]) -> Tensor:
    """The loss of the answer, with gradient `error / N` for the prediction.

    Args:
        prediction: (N, classes): the scores, or a hidden layer's activities through its feedback.
        target: the error (N, classes) and the loss of the answer (a number).
    """
    error, loss = target
    product = (prediction * error).sum(1).mean()
    return product - product.detach() + loss


class DirectFeedback(TrainerRule):
    """One forward pass for the error, then one in which every layer learns from it.

    `delta a_i = (B_i e) * f'(a_i)`, Nokland 2016, arXiv 1609.01596.
    """

    def step(self, x: Tensor, y: Tensor) -> float:
        with torch.no_grad():
            scores = x
            for block in self.blocks:
                scores = block.block(scores)
            error = scores.softmax(1) - F.one_hot(y, scores.shape[1])
            loss = F.cross_entropy(scores, y)
        return self.trainer.step(x, (error, loss))[-1]
