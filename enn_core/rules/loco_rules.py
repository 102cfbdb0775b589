"""Rules without gradients, carried out by `enn_core.loco`: node perturbation, LOCO, its control."""

from __future__ import annotations

from typing import Literal

from torch import Tensor, nn

from enn_core.loco import LOCO
from enn_core.loco.input_projection import Projection
from enn_core.rules.base import Rule


def loco(
    model: nn.Module,
    example: Tensor,
    classes: int,
    *,
    lr: float,
    steps: int,
    seed: int = 0,
    projection: Projection = "loco",
    sigma: float = 0.005,
    probes: int = 1,
    antithetic: bool = False,
    optimizer: Literal["adam", "sgd"] = "adam",
    loss: Literal["mse", "ce"] = "mse",
) -> Rule:
    """All layers perturbed at once; updates projected on the input side. See `LOCO`."""
    return LOCO(
        model,
        lr=lr,
        steps=steps,
        classes=classes,
        seed=seed,
        projection=projection,
        sigma=sigma,
        probes=probes,
        antithetic=antithetic,
        optimizer=optimizer,
        loss=loss,
    )
