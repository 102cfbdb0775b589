"""Learning rules behind one interface: what a bench compares and `enn train` offers.

>>> import torch
>>> from torch import nn
>>> from enn_core.rules import make_rule
>>> model = nn.Sequential(nn.Linear(4, 16), nn.ReLU(), nn.Linear(16, 3))
>>> x, y = torch.randn(8, 4), torch.tensor([0, 1, 2, 0, 1, 2, 0, 1])
>>> rule = make_rule("enn", model, x, classes=3, lr=1e-2, steps=100)
>>> loss = rule.step(x, y)
>>> rule.steps, rule.scores(x).shape
(1, torch.Size([8, 3]))

A new rule is a module with a factory, and a line in `RULES`.
"""

from __future__ import annotations

import inspect
from collections.abc import Mapping
from types import MappingProxyType
from typing import Any

from torch import Tensor, nn

from enn_core.cuts import CutError
from enn_core.rules.backprop import backprop_adamw, backprop_sgd
from enn_core.rules.base import Entry, Rule, RuleError, train_blocks
from enn_core.rules.eigen import enn, enn_penalty
from enn_core.rules.local import dgl, local_enn

__all__ = ["RULES", "Entry", "Rule", "RuleError", "make_rule"]

_RULES = {
    "backprop-adamw": Entry(backprop_adamw, "Loshchilov & Hutter 2019, arXiv 1711.05101, Alg. 2"),
    "backprop-sgd": Entry(backprop_sgd, "Sutskever et al. 2013, ICML 28, eq. 1-2 (momentum)"),
    "enn": Entry(enn, "arXiv 2508.01219, eq. 3-4, Alg. 2; retraction in place of eq. 5"),
    "enn-penalty": Entry(enn_penalty, "arXiv 2508.01219, eq. 3-5, Alg. 2"),
    "local-enn": Entry(local_enn, "arXiv 2508.01219, eq. 6, Alg. 1; retraction", "cuts"),
    "dgl": Entry(dgl, "Belilovsky et al. 2020, arXiv 1901.08164, Alg. 1", "cuts"),
}
RULES: Mapping[str, Entry] = MappingProxyType(_RULES)


def make_rule(
    name: str,
    model: nn.Module,
    example: Tensor,
    classes: int,
    *,
    lr: float,
    steps: int,
    seed: int = 0,
    **options: Any,
) -> Rule:
    """A rule that trains a model.

    The optimiser-based rules share one schedule: linear warm-up over 5 % of the steps, then a
    cosine to 0.

    Args:
        name: a key of `RULES`.
        model: takes inputs (B, ...), answers with scores (B, classes). It belongs to the rule
            from now on and is changed; use `rule.network()`.
        example: a few inputs, on the model's device.
        classes: how many there are.
        lr: highest learning rate.
        steps: batches of the whole run.
        seed: of heads, feedback weights, and whatever is drawn while training.
        options: of this rule, see its factory; and, for those that a `LocalTrainer` carries out,
            of `base.train_blocks` (task, clip, autocast, warm_up, wrap).

    Raises:
        RuleError: no such rule or option, or the rule cannot train this model.
    """
    entry = RULES.get(name)
    if entry is None:
        raise RuleError(f"rule {name!r} is unknown, valid are {', '.join(RULES)}")
    unknown = sorted(set(options) - set(rule_options(name)))
    if unknown:
        raise RuleError(
            f"rule {name!r} has no option {unknown[0]!r}, valid are {', '.join(rule_options(name))}"
        )
    try:
        return entry.make(model, example, classes, lr=lr, steps=steps, seed=seed, **options)
    except CutError as error:
        able = ", ".join(rule for rule, other in RULES.items() if other.needs == "any")
        raise RuleError(f"rule {name!r} cannot cut the model: {error}; or use {able}") from error


def rule_options(name: str) -> list[str]:
    """Names of the options that a rule takes."""
    parameters = list(inspect.signature(RULES[name].make).parameters.values())
    if any(p.kind is p.VAR_KEYWORD for p in parameters):
        parameters += inspect.signature(train_blocks).parameters.values()
    names = [p.name for p in parameters if p.kind is p.KEYWORD_ONLY]
    return [name for name in dict.fromkeys(names) if name not in ("lr", "steps", "seed")]
