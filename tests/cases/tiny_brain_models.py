"""Tiny models with random weights, for tests of what is around them."""

from __future__ import annotations

from typing import Any

import torch

from neuro.age.model import BrainAgeModel, Member
from neuro.age.networks import build
from neuro.age.targets import AgeValue


def tiny_model(members: int = 2, **parts: Any) -> BrainAgeModel:
    """Networks that say something about 50, each brain something else."""
    nets = []
    for seed in range(members):
        torch.manual_seed(seed)
        net = build("bins4", widths=(8, 8, 8, 8))
        for unit in net.blocks:
            torch.nn.init.normal_(unit.head.out.weight, std=0.02)
        nets.append(Member(net.eval(), AgeValue(50.0, 15.0)))
    return BrainAgeModel(nets, **{"about": {"ages": [20.0, 82.0]}, **parts})
