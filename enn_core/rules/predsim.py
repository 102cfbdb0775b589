"""Local-loss learning with similarity matching: blocks learn to predict and to sort by class."""

from __future__ import annotations

from functools import partial
from typing import Any

from torch import Tensor, nn
from torch.nn import functional as F

from enn_core.cuts import By, measure
from enn_core.heads import Form
from enn_core.local import adamw
from enn_core.rules.base import TrainerRule, seeded, train_blocks
from enn_core.rules.enn_local import BLOCKS, blocks_with_heads


def predsim(
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
    beta: float = 0.99,
    **training: Any,
) -> TrainerRule:
    """DGL's blocks with `(1 - beta) * cross-entropy + beta * similarity` (the last: the former)."""
    made = blocks_with_heads(model, example, classes, seed, blocks, head, by)
    shapes = [cost.shape for cost in measure(made, example, repeats=0)]
    with seeded(example, seed + 1):
        for block, shape in zip(made[:-1], shapes, strict=False):
            weight = next(block.parameters())
            similar = SimilarityHead(tuple(shape or ()))
            block.head = BothHeads(block.head, similar.to(weight.device, weight.dtype))
    optimizer = partial(adamw, lr=lr, weight_decay=weight_decay)
    task = partial(predsim_loss, beta=beta, classes=classes)
    return train_blocks(made, optimizer, steps=steps, seed=seed, task=task, **training)


class SimilarityHead(nn.Module):
    """Features to the vectors that are compared (N, C): one layer, then the spread over space.

    A 3 x 3 convolution for images (N, C, H, W), else a linear map of the channels; of features
    with axes of space the standard deviation over these.

    Args:
        shape: of the features: (N, C), (N, L, C) or (N, C, H, W).
    """

    def __init__(self, shape: tuple[int, ...]) -> None:
        super().__init__()
        if len(shape) == 4:
            self.layer: nn.Module = nn.Conv2d(shape[1], shape[1], 3, padding=1)
        else:
            self.layer = nn.Linear(shape[-1], shape[-1])

    def forward(self, h: Tensor) -> Tensor:
        h = self.layer(h)
        if h.ndim == 2:
            return h
        return h.std(1) if h.ndim == 3 else h.flatten(2).std(2)


class BothHeads(nn.Module):
    """Scores (N, classes) and vectors to compare (N, C)."""

    def __init__(self, predict: nn.Module, similar: nn.Module) -> None:
        super().__init__()
        self.predict, self.similar = predict, similar

    def forward(self, h: Tensor) -> tuple[Tensor, Tensor]:
        return self.predict(h), self.similar(h)


def predsim_loss(
    prediction: Tensor | tuple[Tensor, Tensor], y: Tensor, beta: float, classes: int
) -> Tensor:
    """`(1 - beta) L_pred + beta L_sim` of Nokland & Eidnes 2019, arXiv 1901.06656.

    L_sim is the mean over the pairs of a batch, so that beta does not depend on its size. The
    answer, which comes as scores alone, learns by cross-entropy.
    """
    if isinstance(prediction, Tensor):
        return F.cross_entropy(prediction, y)
    scores, vectors = prediction
    wanted = similarity(F.one_hot(y, classes).to(vectors.dtype))
    matched = F.mse_loss(similarity(vectors), wanted)
    return (1 - beta) * F.cross_entropy(scores, y) + beta * matched


def similarity(vectors: Tensor) -> Tensor:
    """Cosine similarities (N, N) of vectors (N, C), each less its own mean."""
    centred = F.normalize(vectors - vectors.mean(1, keepdim=True), dim=1)
    return centred @ centred.mT
