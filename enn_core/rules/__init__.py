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
from functools import partial
from types import MappingProxyType
from typing import Any

from torch import Tensor, nn

from enn_core.cuts import CutError
from enn_core.loco.stages import UnsupportedModel
from enn_core.rules import (
    backprop,
    dfa,
    enn,
    enn_local,
    forward_forward,
    loco_rules,
    mono_forward,
    muon,
    predsim,
    srip_ocnn,
)
from enn_core.rules.base import Entry, Rule, RuleError, train_blocks

__all__ = ["RULES", "Entry", "Rule", "RuleError", "make_rule", "rule_options"]

_RULES = {
    "backprop-adamw": Entry(
        backprop.backprop_adamw, "Loshchilov & Hutter 2019, arXiv 1711.05101, Alg. 2"
    ),
    "backprop-sgd": Entry(
        backprop.backprop_sgd, "Sutskever et al. 2013, ICML 28, eq. 1-2: classical momentum"
    ),
    "enn": Entry(enn.enn, "arXiv 2508.01219, eq. 3 and Alg. 2; retraction in place of eq. 5"),
    "enn-penalty": Entry(enn.enn_penalty, "arXiv 2508.01219, eq. 3-5 and Alg. 2"),
    "muon": Entry(
        muon.muon, "Jordan et al. 2024 by torch.optim.Muon; scaling of arXiv 2502.16982, sec. 2.2"
    ),
    "srip": Entry(
        srip_ocnn.srip, "Bansal et al. 2018, arXiv 1810.09102: sigma(W^T W - I), power iteration"
    ),
    "ocnn": Entry(
        srip_ocnn.ocnn, "Wang et al. 2020, arXiv 1911.12207: ||Conv(K, K, P, S) - I||_F^2"
    ),
    "local-enn": Entry(
        enn_local.local_enn,
        "arXiv 2508.01219, eq. 6 and Alg. 1; retraction in place of the penalty",
        "cuts",
    ),
    "dgl": Entry(enn_local.dgl, "Belilovsky et al. 2020, arXiv 1901.08164, Alg. 1", "cuts"),
    "predsim": Entry(
        predsim.predsim,
        "Nokland & Eidnes 2019, arXiv 1901.06656: (1 - beta) L_pred + beta L_sim",
        "cuts",
    ),
    "mono-forward": Entry(
        mono_forward.mono_forward,
        "Gong et al. 2025, arXiv 2501.09238: cross-entropy of a_i M_i^T in every layer",
        "cuts",
    ),
    "forward-forward": Entry(
        forward_forward.forward_forward,
        "Hinton 2022, arXiv 2212.13345, eq. 1: p(true) = sigma(goodness - threshold)",
        "layers",
    ),
    "dfa": Entry(
        dfa.dfa, "Nokland 2016, arXiv 1609.01596: delta a_i = (B_i e) * f'(a_i)", "layers"
    ),
    "node-perturbation": Entry(
        partial(loco_rules.loco, projection="none"),
        "the estimator of arXiv 2602.22259 without its projection",
        "layers",
    ),
    "loco": Entry(loco_rules.loco, "Ma & Yu 2026, arXiv 2602.22259, reconstructed", "layers"),
    "loco-mean": Entry(
        partial(loco_rules.loco, projection="mean"),
        "control of LOCO: only the mean input is projected out",
        "layers",
    ),
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
            of `base.train_blocks` (task, clip, autocast, schedule, wrap).

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
    except (CutError, UnsupportedModel) as error:
        able = ", ".join(rule for rule, other in RULES.items() if other.needs == "any")
        reason = str(error).partition(";")[0]
        raise RuleError(
            f"rule {name!r} cannot train this model ({reason}); rules that can: {able}"
        ) from error


def rule_options(name: str) -> list[str]:
    """Names of the options that a rule takes."""
    parameters = list(inspect.signature(RULES[name].make).parameters.values())
    if any(p.kind is p.VAR_KEYWORD for p in parameters):
        parameters += inspect.signature(train_blocks).parameters.values()
    names = [p.name for p in parameters if p.kind is p.KEYWORD_ONLY]
    return [name for name in dict.fromkeys(names) if name not in ("lr", "steps", "seed")]
