"""Data, networks and learning rates with which tests try every learning rule."""

from __future__ import annotations

from functools import cache

import torch
from torch import Tensor, nn

from enn_core.rules import RULES, Rule, make_rule

LR = {"backprop-sgd": 0.1, "node-perturbation": 5e-3, "loco": 2e-2, "loco-mean": 1e-2}
PERTURBING = ("node-perturbation", "loco", "loco-mean")
LAYERWISE = tuple(name for name, entry in RULES.items() if entry.needs == "layers")


@cache
def digits() -> tuple[Tensor, Tensor]:
    from sklearn.datasets import load_digits

    data = load_digits()
    order = torch.randperm(len(data.target), generator=torch.Generator().manual_seed(0))
    x = torch.from_numpy(data.images[:, None] / 8 - 1).float()
    return x[order], torch.from_numpy(data.target).long()[order]


def mlp(seed: int = 0, width: int = 32) -> nn.Sequential:
    """Four layers with weights."""
    torch.manual_seed(seed)
    layers: list[nn.Module] = [nn.Flatten()]
    before = 64
    for _ in range(3):
        layers += [nn.Linear(before, width), nn.ReLU()]
        before = width
    return nn.Sequential(*layers, nn.Linear(width, 10))


def conv(seed: int = 0) -> nn.Sequential:
    """Convolutions, pools and a last layer: no norms."""
    torch.manual_seed(seed)
    return nn.Sequential(
        *(nn.Conv2d(1, 8, 3, padding=1), nn.ReLU(), nn.AvgPool2d(2)),
        *(nn.Conv2d(8, 12, 3, padding=1), nn.ReLU()),
        *(nn.Conv2d(12, 12, 3, padding=1), nn.ReLU()),
        *(nn.Conv2d(12, 12, 3, padding=1), nn.ReLU(), nn.Flatten()),
        nn.Linear(12 * 16, 10),
    )


def normed(seed: int = 0) -> nn.Sequential:
    """With batch norms and dropout: state and random numbers of its own."""
    torch.manual_seed(seed)
    layers: list[nn.Module] = []
    before = 1
    for after in (8, 12, 12, 16):
        layers += [nn.Conv2d(before, after, 3, padding=1), nn.BatchNorm2d(after), nn.ReLU()]
        layers += [nn.Dropout(0.1)]
        before = after
    return nn.Sequential(*layers, nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(16, 10))


def made(name: str, model: nn.Module, steps: int, seed: int = 0, **options: object) -> Rule:
    lr = LR.get(name, 2e-2)
    return make_rule(name, model, digits()[0][:8], 10, lr=lr, steps=steps, seed=seed, **options)


def train(rule: Rule, steps: int, batch: int = 64) -> list[float]:
    """So many more steps, on batches that depend on the rule's step alone."""
    x, y = digits()
    losses = []
    for _ in range(steps):
        random = torch.Generator().manual_seed(rule.steps)
        rows = torch.randint(0, 1200, (batch,), generator=random)
        losses.append(rule.step(x[rows], y[rows]))
    return losses


def accuracy(rule: Rule) -> float:
    x, y = digits()
    return float((rule.scores(x[1200:]).argmax(1) == y[1200:]).float().mean())
