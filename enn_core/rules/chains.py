"""Networks as chains of layers, for rules that must see every layer's input and output."""

from __future__ import annotations

from torch import nn

from enn_core.loco.stages import to_stages


def layers_of(model: nn.Module) -> list[nn.Sequential]:
    """Parts with one `nn.Linear` or `nn.Conv2d` each, and the functions that follow it.

    Applied one after the other they are the model; they share its parameters.

    Raises:
        UnsupportedModel: the model is no such chain (which layer, and why).
    """
    first, stages = to_stages(model)
    parts = [nn.Sequential(stage.layer, *stage.after) for stage in stages]
    parts[0] = nn.Sequential(*first, *parts[0])
    return parts
