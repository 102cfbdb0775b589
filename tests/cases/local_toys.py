"""A small network in local blocks and its endless data, for tests in several processes.

As a program it trains until it is killed: `python -m local_toys STATE`.
"""

from __future__ import annotations

import sys
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from enn_core import LocalBlock, LocalTrainer, to_enn
from enn_core.local import adamw


def make(blocks: int = 3, **options: Any) -> LocalTrainer:
    """Eigen layers, batch norms and dropout: whatever has a state or draws numbers."""
    torch.manual_seed(0)
    made = []
    for index in range(blocks):
        layers = (nn.Linear(6 if index == 0 else 8, 8), nn.BatchNorm1d(8), nn.ReLU())
        body = to_enn(nn.Sequential(*layers, nn.Dropout(0.3)))
        made.append(LocalBlock(body, nn.Linear(8, 4)))
    defaults: dict[str, Any] = {
        "optimizer": partial(adamw, lr=1e-2),
        "schedule": partial(torch.optim.lr_scheduler.OneCycleLR, max_lr=1e-2, total_steps=10**5),
        "retract_every": 3,
        "seed": 5,
    }
    return LocalTrainer(made, nn.functional.cross_entropy, **{**defaults, **options})


def batch(step: int) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(step)
    x = torch.randn(16, 6, generator=generator)
    return x, x[:, :4].argmax(1)


def weights(trainer: LocalTrainer) -> list[Tensor]:
    return [tensor for block in trainer.blocks for tensor in block.state_dict().values()]


def same(a: LocalTrainer, b: LocalTrainer) -> bool:
    """Whether two trainers have the same past and the same weights, to the bit."""
    pairs = zip(weights(a), weights(b), strict=True)
    return torch.equal(a.losses, b.losses) and all(torch.equal(x, y) for x, y in pairs)


def main() -> None:
    torch.set_num_threads(1)
    trainer = make()
    trainer.save(sys.argv[1])
    print(trainer.steps, flush=True)
    while True:
        trainer.step(*batch(trainer.steps))
        if trainer.steps % 2 == 0:
            trainer.save(sys.argv[1])
            print(trainer.steps, flush=True)


if __name__ == "__main__":
    main()
