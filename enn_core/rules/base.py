"""What every learning rule is: one object that trains one model, batch by batch.

Most rules differ in how a network is cut, what each part minimises and who steps the weights;
`train_blocks` builds these on the one loop of `enn_core.local.LocalTrainer`.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass
from functools import partial
from typing import Any, Literal, Protocol, cast

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.optim import Optimizer
from torch.optim.lr_scheduler import LambdaLR

from enn_core.local import (
    LocalBlock,
    LocalTrainer,
    MakeOptimizer,
    MakeSchedule,
    Penalty,
    Task,
    random_stream,
)
from enn_core.schedules import warm_up_cosine

Needs = Literal["any", "cuts", "layers"]


class RuleError(ValueError):
    """A rule that does not exist, or that cannot train the model it was given."""


class Rule(Protocol):
    """One way of training one model.

    Attributes:
        steps: batches learnt from.
    """

    @property
    def steps(self) -> int: ...

    def step(self, x: Tensor, y: Tensor) -> float:
        """Learn from inputs (B, ...) and labels (B,) int64.

        Returns:
            The loss of the answer, from before the update.
        """
        ...

    def scores(self, x: Tensor) -> Tensor:
        """Scores (B, classes), in evaluation mode, without gradient."""
        ...

    def network(self) -> nn.Module:
        """A plain module that gives the same scores and shares the parameters."""
        ...

    def state_dict(self) -> dict[str, Any]:
        """Everything that the rest of the run depends on, besides the batches to come."""
        ...

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Go on exactly where the state was taken."""
        ...


@dataclass(frozen=True)
class Entry:
    """A rule in the registry.

    Attributes:
        make: builds it, with the arguments of `make_rule` but the name.
        source: paper and equation it follows.
        needs: of a model: "any", "cuts" (places where one tensor passes: `enn_core.cuts`) or
            "layers" (a `nn.Sequential` of linear maps and parameter-free layers).
    """

    make: Callable[..., Rule]
    source: str
    needs: Needs = "any"


class TrainerRule:
    """A rule that a `LocalTrainer` carries out: backpropagation (one block) and all local rules.

    Args:
        trainer: of the blocks, which may be wrapped.
        blocks: the `LocalBlock`s themselves.
    """

    def __init__(self, trainer: LocalTrainer, blocks: Sequence[LocalBlock]) -> None:
        self.trainer, self.blocks = trainer, list(blocks)

    @property
    def steps(self) -> int:
        return self.trainer.steps

    def step(self, x: Tensor, y: Tensor) -> float:
        return self.trainer.step(x, y)[-1]

    def scores(self, x: Tensor) -> Tensor:
        return cast(Tensor, self.trainer.answer(x))

    def network(self) -> nn.Module:
        return nn.Sequential(*(block.block for block in self.blocks), self.blocks[-1].head)

    def state_dict(self) -> dict[str, Any]:
        return self.trainer.state_dict()

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        self.trainer.load_state_dict(state)


def train_blocks(
    blocks: Sequence[LocalBlock],
    optimizer: MakeOptimizer,
    *,
    steps: int,
    seed: int,
    task: Task = F.cross_entropy,
    penalty: float | Penalty = 0.0,
    retract_every: int = 0,
    clip: float | None = None,
    autocast: torch.dtype | None = None,
    schedule: MakeSchedule | None = None,
    wrap: Callable[[nn.Module], nn.Module] | None = None,
) -> TrainerRule:
    """A rule from blocks and what steps their weights; see `LocalTrainer`.

    Args:
        blocks: in training mode from now on.
        optimizer: makes each block's.
        steps: of the whole run, at least 1.
        seed: of the random numbers drawn while training.
        task: loss of a prediction and the labels.
        penalty, retract_every, clip, autocast: as in `LocalTrainer`.
        schedule: makes the scheduler of an optimizer; `decay` over `steps` by default.
        wrap: put around each block, e.g. `DistributedDataParallel`.
    """
    if steps < 1:
        raise RuleError(f"steps={steps} is invalid, give the number of batches, >= 1")
    for block in blocks:
        block.train()
    trainer = LocalTrainer(
        [wrap(block) for block in blocks] if wrap else blocks,
        task,
        optimizer=optimizer,
        schedule=schedule or partial(decay, steps=steps),
        retract_every=retract_every,
        penalty=penalty,
        clip=clip,
        autocast=autocast,
        seed=seed,
    )
    return TrainerRule(trainer, blocks)


def decay(optimizer: Optimizer, steps: int) -> LambdaLR:
    """`enn_core.schedules.warm_up_cosine` of an optimizer."""
    return LambdaLR(optimizer, partial(warm_up_cosine, steps=steps))


def seeded(example: Tensor, seed: int) -> AbstractContextManager[None]:
    """Random numbers for what a rule adds to a model (heads, feedback weights)."""
    return random_stream(example.device, seed, -1)
