"""Node perturbation: the gradient from forward passes and one number per sample.

Every layer's output gets noise `xi ~ N(0, sigma^2)` at once, the noise propagates, and the change
of a sample's loss, `dL`, is broadcast. `dL xi / sigma^2` is then an estimate of the gradient of the
loss with respect to that output, unbiased for the loss smoothed by the noise, and its outer product
with the layer's own input is the weights' (Williams 1992; Werfel, Xie & Seung 2005, eq. 4; as used
by LOCO, arXiv 2602.22259, with the noise on the activity).
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from enn_core.loco.stages import Stage, over_time

__all__ = ["LOSSES", "Estimate", "Perturbation", "SampleLoss", "perturb", "restricted"]

SampleLoss = Callable[[Tensor, Tensor], Tensor]


def squared(scores: Tensor, y: Tensor) -> Tensor:
    """Half squared distance to the one-hot label, per sample: (B, classes), (B,) -> (B,)."""
    return 0.5 * (scores - F.one_hot(y, scores.shape[1])).square().sum(1)


def cross_entropy(scores: Tensor, y: Tensor) -> Tensor:
    """Cross-entropy per sample: (B, classes), (B,) -> (B,)."""
    return F.cross_entropy(scores, y, reduction="none")


def restricted(loss: SampleLoss, outputs: Sequence[int] | None) -> SampleLoss:
    """A per-sample loss that sees only some of the scores; labels stay those of all scores."""
    if outputs is None:
        return loss
    columns = torch.tensor(list(outputs))

    def seen(scores: Tensor, y: Tensor) -> Tensor:
        chosen = columns.to(y.device)
        return loss(scores[:, chosen], (y[:, None] == chosen).long().argmax(1))

    return seen


LOSSES: dict[str, SampleLoss] = {"mse": squared, "ce": cross_entropy}


@dataclass(frozen=True)
class Perturbation:
    """How outputs are perturbed.

    Args:
        sigma: standard deviation of the noise on each layer's output, above 0; in a spiking
            network the noise is a current, the same in all time steps.
        probes: independent noises per sample, at least 1.
        antithetic: measure each noise with both signs: the second-order error cancels, for a second
            pass per probe.
        gate: no noise and no error for units that cannot respond (clamped ones).
    """

    sigma: float = 0.005
    probes: int = 1
    antithetic: bool = False
    gate: bool = True

    def __post_init__(self) -> None:
        if not self.sigma > 0:
            raise ValueError(f"sigma must be above 0, got {self.sigma}")
        if self.probes < 1:
            raise ValueError(f"probes must be at least 1, got {self.probes}")


@dataclass(frozen=True)
class Estimate:
    """What one batch says of one layer.

    Attributes:
        rows: (B, positions, columns), inputs of the pass without noise, means over time.
        errors: (B, positions, out), estimated derivative of the sample's loss.
    """

    rows: Tensor
    errors: Tensor

    def gradient(self) -> Tensor:
        """(out, columns): derivative of the batch's mean loss."""
        return self.errors.flatten(0, 1).T @ self.rows.flatten(0, 1) / len(self.rows)


def perturb(
    first: Sequence[nn.Module],
    stages: Sequence[Stage],
    x: Tensor,
    y: Tensor,
    loss: SampleLoss,
    how: Perturbation,
    time: int = 1,
    outputs: Sequence[int] | None = None,
) -> tuple[list[Estimate], Tensor]:
    """One batch's estimate for every layer; no pass backwards, and no graph is needed.

    Args:
        first: functions before the first layer.
        stages: the network.
        x: inputs (B, ...).
        y: labels (B,).
        loss: of scores (B, classes) and labels, per sample.
        how: sigma, probes, antithetic, gate.
        time: steps of a spiking network, else 1.
        outputs: of the last layer that are perturbed; all by default. Outputs that the loss does
            not see would learn noise, which an optimizer that rescales makes as large as the rest.

    Returns:
        The estimates, first layer first, and the losses (B,) of the pass without noise.
    """
    signs = 2 if how.antithetic else 1
    passes = 1 + how.probes * signs  # the first without noise
    h = x
    for module in first:
        h = module(h)
    rows, noises = [], []
    for index, stage in enumerate(stages):
        clean = h if index == 0 else _clean(h, time, passes)
        rows.append(stage.rows(over_time(clean, time)))
        z = stage.layer(h)
        copies = 1 if index == 0 else passes  # the first layer's output is computed once
        current = over_time(_clean(z, time, copies), time)
        noise = how.sigma * torch.randn(
            how.probes, *current.shape, dtype=z.dtype, device=z.device
        )  # (probes, B, out, ...)
        if how.gate and stage.linear is not None:
            low, high = stage.linear
            noise *= (current > low - how.sigma) & (current < high + how.sigma)
        if outputs is not None and stage is stages[-1]:
            seen = torch.zeros_like(noise[0, 0])
            seen[list(outputs)] = 1.0
            noise *= seen
        noises.append(noise)
        signed = torch.cat([torch.zeros_like(noise[:1]), noise, *([-noise] if signs == 2 else [])])
        z = z.unflatten(0, (time, copies, -1)) + signed
        h = stage.finish(z.flatten(0, 2))
    losses = loss(h, y.repeat(passes)).unflatten(0, (passes, -1))
    if signs == 2:
        changes = 0.5 * (losses[1 : 1 + how.probes] - losses[1 + how.probes :])
    else:
        changes = losses[1:] - losses[0]
    scale = changes / (how.sigma**2 * how.probes)  # (probes, B): the only thing that is broadcast
    return [
        Estimate(r, stage.errors(torch.einsum("pb,pb...->b...", scale, noise)))
        for stage, r, noise in zip(stages, rows, noises, strict=True)
    ], losses[0]


def _clean(h: Tensor, time: int, passes: int) -> Tensor:
    """Of (time * passes * B, ...), the pass without noise: (time * B, ...)."""
    return h if passes == 1 else h.unflatten(0, (time, passes, -1))[:, 0].flatten(0, 1)
