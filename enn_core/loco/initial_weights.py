"""Initial weights for deep networks of rate or spiking neurons."""

from __future__ import annotations

import math

import torch
from torch import Tensor, nn

from enn_core.loco.stages import over_time, time_steps, to_stages

__all__ = ["calibrate_"]


@torch.no_grad()
def calibrate_(model: nn.Module, x: Tensor, spread: float = 0.25) -> None:
    """Orthogonal weights, scaled and centred on data so that neurons work in their linear range.

    Clamped neurons pass on positive values alone: with usual initial weights these drift together
    from layer to layer until all inputs look the same, and ten layers answer nothing. Here each
    layer's outputs get, over a batch, the mean of the linear range (unit by unit, by the bias) and
    `spread` of its width as standard deviation (over all units). One forward pass; labels are not
    used. Layer-sequential scaling follows Mishkin & Matas (arXiv 1511.06422); the centring is ours.

    Args:
        model: as `LOCO` takes it, every layer with a bias; changed in place. Torch's global random
            numbers choose the weights.
        x: a batch (B, ...) of inputs; a few hundred are enough.
        spread: above 0. At 0.25 some 5 % of the neurons are clamped and deep networks keep what
            they were given; at 1 most are, which makes wide shallow ones tell more inputs apart.

    Raises:
        UnsupportedModel: a layer that `LOCO` cannot train.
        ValueError: a layer without a bias, or one whose output does not vary.
    """
    if not spread > 0:
        raise ValueError(f"spread must be above 0, got {spread}")
    first, stages = to_stages(model)
    time = time_steps(model)
    h = x
    for module in first:
        h = module(h)
    for stage in stages:
        weight, bias = stage.layer.weight, stage.layer.bias
        if bias is None:
            raise ValueError(f"layer {stage.name} has no bias to centre its outputs with; add one")
        nn.init.orthogonal_(weight)
        bias.zero_()
        low, high = stage.linear or (-0.5, 0.5)
        low, high = (-2.0, 2.0) if math.isinf(high) else (low, high)
        z = stage.layer(h)
        values = stage.errors(over_time(z, time)).flatten(0, 1)
        deviation = (values - values.mean(0)).square().mean().sqrt()
        if not deviation > 0:
            raise ValueError(
                f"layer {stage.name} gives one answer to all {len(x)} inputs; they must differ"
            )
        scale = (high - low) * spread / deviation
        shift = (low + high) / 2 - values.mean(0) * scale
        weight.mul_(scale)
        bias.copy_(shift)
        h = stage.finish(stage.layer(h))
