"""LOCO as a learning rule: forward passes, one broadcast number per sample, projected updates.

>>> import torch
>>> from torch import nn
>>> from enn_core.loco import LOCO
>>> from enn_core.spiking import ClampedReLU
>>> model = nn.Sequential(nn.Linear(4, 16), ClampedReLU(), nn.Linear(16, 3))
>>> rule = LOCO(model, lr=1e-2, steps=100)
>>> with torch.inference_mode():
...     loss = rule.step(torch.rand(8, 4), torch.randint(3, (8,)))
>>> rule.scores(torch.rand(2, 4)).shape, rule.steps
(torch.Size([2, 3]), 1)
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any, Literal, Protocol

import torch
from torch import Tensor, nn

from enn_core.local import random_stream
from enn_core.loco.input_projection import InputProjection, Projection
from enn_core.loco.node_perturbation import (
    LOSSES,
    Estimate,
    Perturbation,
    SampleLoss,
    perturb,
    restricted,
)
from enn_core.loco.stages import Stage, time_steps, to_stages
from enn_core.schedules import warm_up_cosine

__all__ = ["LOCO"]


class Protects(Protocol):
    """What `enn_core.lab.continual.Protection` is to `LOCO`."""

    def project(self, index: int, change: Tensor) -> Tensor:
        """The allowed part of a change (out, columns) of layer `index`."""
        ...


class LOCO:
    """Trains a chain of layers by node perturbation with projected updates.

    All layers are perturbed at once and learn at once, each from its own input, its own noise and
    the broadcast change of the loss: a step needs one or more forward passes, no backward pass and
    no gradient, and runs under `torch.inference_mode`.

    Args:
        model: `nn.Sequential` of `nn.Linear`, `nn.Conv2d` (by patches) and functions without
            weights; a spiking network as `enn_core.spiking` describes it.
        lr: learning rate, above 0, after a linear warm-up of 5 % of the steps; then a cosine to 0.
        steps: length of the schedule; 0 keeps the rate constant.
        classes: number of scores, checked against the last layer if given.
        sigma, probes, antithetic, gate: see `Perturbation`.
        projection: of the update, on the input side: see `enn_core.loco.input_projection`.
        rank, clusters, buffer, every: see `InputProjection`.
        optimizer: `adam` or `sgd` (momentum 0.9), applied before the projection.
        loss: `mse` (half squared distance to the one-hot label), `ce`, or a function of scores
            (B, classes) and labels (B,) that gives the losses (B,).
        outputs: scores that this task compares; the loss sees no others, and what gives the others
            stays as it is. All by default.
        protection: of earlier tasks' inputs, projects every update last, see
            `enn_core.lab.continual`.
        seed: of the noise.

    Attributes:
        steps: batches learnt from.

    Raises:
        UnsupportedModel: a layer that cannot be trained so (a ValueError).
        ValueError: a value out of range.
    """

    def __init__(
        self,
        model: nn.Module,
        *,
        lr: float,
        steps: int,
        classes: int | None = None,
        sigma: float = 0.005,
        probes: int = 1,
        antithetic: bool = False,
        gate: bool = True,
        projection: Projection = "loco",
        rank: int = 110,
        clusters: int = 10,
        buffer: int = 1000,
        every: int = 10,
        optimizer: Literal["adam", "sgd"] = "adam",
        loss: Literal["mse", "ce"] | SampleLoss = "mse",
        outputs: Sequence[int] | None = None,
        protection: Protects | None = None,
        seed: int = 0,
    ) -> None:
        if not lr > 0:
            raise ValueError(f"lr must be above 0, got {lr}")
        if steps < 0:
            raise ValueError(f"steps must be at least 0, got {steps}")
        if optimizer not in ("adam", "sgd"):
            raise ValueError(f"optimizer must be adam or sgd, got {optimizer!r}")
        if isinstance(loss, str) and loss not in LOSSES:
            raise ValueError(f"loss must be one of {', '.join(LOSSES)}, got {loss!r}")
        self.model = model
        self.first, self.stages = to_stages(model)
        last = self.stages[-1].layer
        if classes is not None and isinstance(last, nn.Linear) and last.out_features != classes:
            raise ValueError(
                f"the model gives {last.out_features} scores for {classes} classes; match them"
            )
        self.time = time_steps(model)
        self.how = Perturbation(sigma, probes, antithetic, gate)
        self.lr, self.length, self.seed = lr, steps, seed
        self.loss = restricted(LOSSES[loss] if isinstance(loss, str) else loss, outputs)
        self.outputs = outputs
        self.protection = protection
        self.steps = 0
        self.projections = [
            InputProjection(
                stage.columns, projection, rank=rank, clusters=clusters, buffer=buffer, every=every
            )
            for stage in self.stages
        ]
        make = _Adam if optimizer == "adam" else _Momentum
        self.optimizers: list[_Adam | _Momentum] = [make(stage) for stage in self.stages]

    @torch.inference_mode()
    def step(self, x: Tensor, y: Tensor) -> float:
        """Learn from inputs (B, ...) and labels (B,) int64; the mean loss before the update.

        Raises:
            FloatingPointError: the loss is not finite; the weights are spoilt.
        """
        with random_stream(x.device, self.seed, self.steps):
            estimates, losses = perturb(
                self.first, self.stages, x, y, self.loss, self.how, self.time, self.outputs
            )
        value = float(losses.mean())
        if not math.isfinite(value):
            raise FloatingPointError(
                f"the loss is {value} at step {self.steps + 1}; load the last checkpoint, and "
                "lower the learning rate"
            )
        rate = self.lr * (warm_up_cosine(self.steps, self.length) if self.length else 1.0)
        self.steps += 1
        for index, estimate in enumerate(estimates):  # no step of this loop needs another's
            self._update(index, estimate, rate)
        return value

    def _update(self, index: int, estimate: Estimate, rate: float) -> None:
        projection = self.projections[index]
        projection.observe(estimate.rows.flatten(0, 1))
        gradient = estimate.gradient()
        if self.protection is not None:  # before Adam too, which else scales to what is forbidden
            gradient = self.protection.project(index, gradient)
        change = self.optimizers[index].direction(gradient, self.steps)
        change = projection.project(change)
        if self.protection is not None:
            change = self.protection.project(index, change)
        self.stages[index].add(-rate * change)

    @torch.inference_mode()
    def scores(self, x: Tensor) -> Tensor:
        """Scores (B, classes)."""
        return self.model(x)

    def network(self) -> nn.Module:
        """The model itself."""
        return self.model

    def state_dict(self) -> dict[str, Any]:
        """Weights, optimizer and projectors: a run goes on from it to the bit."""
        return {
            "steps": self.steps,
            "model": self.model.state_dict(),
            "optimizers": [optimizer.state_dict() for optimizer in self.optimizers],
            "projections": [projection.state_dict() for projection in self.projections],
        }

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        self.steps = state["steps"]
        self.model.load_state_dict(state["model"])
        for name in ("optimizers", "projections"):
            for mine, stored in zip(getattr(self, name), state[name], strict=True):
                mine.load_state_dict(stored)


class _Momentum:
    """Heavy ball: `m <- 0.9 m + g`."""

    def __init__(self, stage: Stage) -> None:
        self.m = torch.zeros_like(stage.matrix())

    def direction(self, gradient: Tensor, step: int) -> Tensor:
        self.m = 0.9 * self.m + gradient
        return self.m.clone()

    def state_dict(self) -> dict[str, Tensor]:
        return {"m": self.m}

    def load_state_dict(self, state: Mapping[str, Tensor]) -> None:
        self.m = state["m"].clone()


class _Adam:
    """Adam's direction (Kingma & Ba 2015) with its usual constants."""

    def __init__(self, stage: Stage) -> None:
        self.m = torch.zeros_like(stage.matrix())
        self.v = torch.zeros_like(self.m)

    def direction(self, gradient: Tensor, step: int) -> Tensor:
        self.m = torch.lerp(self.m, gradient, 1 - 0.9)
        self.v = torch.lerp(self.v, gradient.square(), 1 - 0.999)
        scale = (self.v / (1 - 0.999**step)).sqrt_().add_(1e-8)
        return self.m / scale / (1 - 0.9**step)

    def state_dict(self) -> dict[str, Tensor]:
        return {"m": self.m, "v": self.v}

    def load_state_dict(self, state: Mapping[str, Tensor]) -> None:
        self.m, self.v = state["m"].clone(), state["v"].clone()
