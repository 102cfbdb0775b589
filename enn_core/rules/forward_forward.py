"""Forward-Forward: layers tell inputs with their true label from inputs with a wrong one.

A layer's goodness is the sum of its squared activities; the class with the highest goodness is the
answer.
"""

from __future__ import annotations

from collections.abc import Mapping
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from enn_core.local import LocalBlock, LocalTrainer, adamw, random_stream
from enn_core.rules.base import RuleError, TrainerRule, seeded, train_blocks
from enn_core.rules.chains import layers_of


def forward_forward(
    model: nn.Module,
    example: Tensor,
    classes: int,
    *,
    lr: float,
    steps: int,
    seed: int = 0,
    weight_decay: float = 1e-2,
    threshold: float = 0.2,
    **training: Any,
) -> ForwardForward:
    """Every layer but the model's last, which Forward-Forward has no use for.

    Labels are written into the first pixels where the first layer sees whole inputs; where it is a
    convolution, as one fixed random pattern per class over the whole image.
    """
    parts = layers_of(model)[:-1]
    if not parts:
        raise RuleError(
            "rule 'forward-forward' needs a hidden layer, the model has one layer; use another rule"
        )
    made = [LocalBlock(part, Goodness(threshold)) for part in parts]
    for block in made[1:]:
        block.block = nn.Sequential(Normalise(), block.block)
    whole = any(isinstance(module, nn.Linear) for module in parts[0])
    with seeded(example, seed):
        labels = LabelWriter(example, classes, whole)
    optimizer = partial(adamw, lr=lr, weight_decay=weight_decay)
    rule = train_blocks(made, optimizer, steps=steps, seed=seed, task=separation, **training)
    return ForwardForward(rule.trainer, made, labels)


class Normalise(nn.Module):
    """Activities (N, ...) to length sqrt(size): the next layer must not see their goodness."""

    def forward(self, h: Tensor) -> Tensor:
        scale = h.flatten(1).square().mean(1).add(1e-8).rsqrt()
        return h * scale.view(-1, *[1] * (h.ndim - 1))


class Goodness(nn.Module):
    """Sum of the squared activities (N, ...) less a threshold, (N,).

    Args:
        threshold: per unit, as units may be bounded: activities of at most 1 never reach 1.
    """

    def __init__(self, threshold: float) -> None:
        super().__init__()
        self.threshold = threshold

    def forward(self, h: Tensor) -> Tensor:
        return (h.flatten(1).square() - self.threshold).sum(1)


class LabelWriter(nn.Module):
    """Writes labels into inputs.

    Args:
        example: inputs (N, ...).
        classes: how many labels.
        pixels: one-of-N in the first pixels, else a random pattern over all of the input.
    """

    kept: Tensor
    patterns: Tensor

    def __init__(self, example: Tensor, classes: int, pixels: bool) -> None:
        super().__init__()
        size = example[0].numel()
        if pixels and size <= classes:
            raise RuleError(
                f"rule 'forward-forward' writes {classes} labels over the first pixels, inputs "
                f"have {size}; give larger inputs, or use another rule"
            )
        scale = float(example.abs().max())
        kept = torch.ones(size)
        patterns = torch.zeros(classes, size)
        if pixels:
            kept[:classes] = 0
            patterns[:, :classes] = scale * torch.eye(classes)
        else:
            patterns = torch.randn(classes, size).sign() * scale / 2
        shape = example.shape[1:]
        self.register_buffer("kept", kept.view(shape).to(example))
        self.register_buffer("patterns", patterns.view(classes, *shape).to(example))

    def forward(self, x: Tensor, y: Tensor) -> Tensor:
        return x * self.kept + self.patterns[y]


def separation(goodness: Tensor, sign: Tensor) -> Tensor:
    """Logistic loss of telling true (sign 1) from wrong (-1) labels by goodness; all are (N,)."""
    return F.softplus(-sign * goodness).mean()


class GoodnessNetwork(nn.Module):
    """Scores (N, classes): the goodness with each label written in, over all layers but the first.

    The first layer's counts only if it is the only one.
    """

    def __init__(self, blocks: list[LocalBlock], labels: LabelWriter) -> None:
        super().__init__()
        self.blocks, self.labels = nn.ModuleList(blocks), labels

    def forward(self, x: Tensor) -> Tensor:
        classes = len(self.labels.patterns)
        y = torch.arange(classes, device=x.device).repeat(len(x))
        h = self.labels(x.repeat_interleave(classes, 0), y)
        seen = []
        for block in self.blocks:
            h, goodness = block(h)
            seen.append(goodness)
        return torch.stack(seen[1:] or seen).sum(0).view(-1, classes)


class ForwardForward(TrainerRule):
    """Hinton 2022, arXiv 2212.13345, section 2 and eq. 1; wrong labels are drawn evenly."""

    def __init__(
        self, trainer: LocalTrainer, blocks: list[LocalBlock], labels: LabelWriter
    ) -> None:
        super().__init__(trainer, blocks)
        self._network = GoodnessNetwork(blocks, labels)

    def step(self, x: Tensor, y: Tensor) -> float:
        labels = self._network.labels
        classes = len(labels.patterns)
        with random_stream(x.device, self.trainer.seed, self.trainer.steps, -2):
            wrong = (y + torch.randint(1, classes, y.shape, device=y.device)) % classes
        both = torch.cat([labels(x, y), labels(x, wrong)])
        sign = torch.cat([torch.ones(len(y)), -torch.ones(len(y))]).to(x)
        return self.trainer.step(both, sign)[-1]

    @torch.no_grad()
    def scores(self, x: Tensor) -> Tensor:
        was = self._network.training
        scores: Tensor = self._network.eval()(x)
        self._network.train(was)
        return scores

    def network(self) -> nn.Module:
        return self._network

    def state_dict(self) -> dict[str, Any]:
        return {**super().state_dict(), "labels": self._network.labels.state_dict()}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        super().load_state_dict(state)
        self._network.labels.load_state_dict(state["labels"])
