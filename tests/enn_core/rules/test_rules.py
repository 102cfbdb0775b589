"""What every learning rule must do: learn, resume to the bit, answer with a plain network."""

from __future__ import annotations

import io
from itertools import pairwise

import pytest
import torch
from rule_cases import LAYERWISE, accuracy, conv, digits, made, mlp, normed, train
from torch import nn

from enn_core import fuse
from enn_core.rules import RULES, RuleError, make_rule
from enn_core.rules.base import decay

ANY_MODEL = [name for name in RULES if name not in LAYERWISE]
# Chance is 0.1. Perturbing rules are slow learners.
LEAST = {
    "node-perturbation": 0.3,
    "loco": 0.3,
    "loco-mean": 0.4,
    "forward-forward": 0.5,
    "dfa": 0.7,
}


@pytest.mark.parametrize("name", RULES)
def test_learns_digits(name: str) -> None:
    rule = made(name, mlp(), steps=100)
    losses = train(rule, 100, batch=50)
    assert rule.steps == 100
    assert sum(losses[-20:]) < sum(losses[:20])
    assert accuracy(rule) > LEAST.get(name, 0.8)


@pytest.mark.parametrize("name", RULES)
def test_network_gives_the_scores(name: str) -> None:
    rule = made(name, conv(), steps=10)
    train(rule, 3)
    x = digits()[0][:20]
    network = rule.network().eval()
    with torch.no_grad():
        torch.testing.assert_close(network(x), rule.scores(x), rtol=1e-5, atol=1e-5)
        torch.testing.assert_close(fuse(network)(x), rule.scores(x), rtol=1e-4, atol=1e-4)
    assert rule.scores(x).shape == (20, 10)
    assert not rule.scores(x).requires_grad


@pytest.mark.parametrize(
    ("name", "model"),
    [(name, normed) for name in ANY_MODEL] + [(name, conv) for name in LAYERWISE],
)
def test_resumes_to_the_bit(name: str, model) -> None:  # type: ignore[no-untyped-def]
    whole = made(name, model(), steps=12)
    train(whole, 5)
    file = io.BytesIO()
    torch.save(whole.state_dict(), file)
    went_on = train(whole, 5)
    file.seek(0)
    again = made(name, model(seed=1), steps=12, seed=0)
    again.load_state_dict(torch.load(file, weights_only=True))
    assert again.steps == 5
    assert train(again, 5) == went_on
    x = digits()[0][:50]
    assert torch.equal(again.scores(x), whole.scores(x))


@pytest.mark.parametrize("name", RULES)
def test_seed_decides(name: str) -> None:
    x = digits()[0][:50]
    answers = []
    for disturbed in (0, 1):
        rule = made(name, conv(), steps=10, seed=3)
        torch.manual_seed(disturbed)  # the global state must not matter
        train(rule, 3)
        answers.append(rule.scores(x))
    assert torch.equal(*answers)


@pytest.mark.parametrize("name", LAYERWISE)
def test_norms_are_refused_in_one_line(name: str) -> None:
    with pytest.raises(RuleError, match=r"layer 1 \(BatchNorm2d\).*: backprop-adamw") as caught:
        made(name, normed(), steps=10)
    assert "\n" not in str(caught.value)


def test_errors_say_what_is_valid() -> None:
    x = digits()[0][:4]
    with pytest.raises(RuleError, match="'backprob' is unknown, valid are backprop-adamw, "):
        make_rule("backprob", mlp(), x, 10, lr=1e-3, steps=5)
    with pytest.raises(RuleError, match=r"has no option 'hed', valid are .*head"):
        made("dgl", mlp(), 5, hed="conv")
    with pytest.raises(RuleError, match="steps=0"):
        made("enn", mlp(), 0)
    with pytest.raises(RuleError, match=r"'local-enn' cannot train this model .*; rules that can"):
        made("local-enn", nn.Sequential(nn.Flatten(), nn.Linear(64, 10)), 5)


def test_all_rules_have_a_source() -> None:
    assert all("arXiv" in e.source or "ICML" in e.source or "control" in e.source
               for e in RULES.values())  # fmt: skip


def test_schedule_warms_up_and_ends_at_zero() -> None:
    optimizer = torch.optim.SGD([nn.Parameter(torch.zeros(1))], lr=2.0)
    schedule = decay(optimizer, steps=100)
    rates = []
    for _ in range(101):
        rates.append(schedule.get_last_lr()[0])
        optimizer.step()
        schedule.step()
    assert rates[0] == pytest.approx(2 / 5)
    assert max(rates) == rates[4] == 2.0
    assert rates[100] == pytest.approx(0, abs=1e-3)
    assert rates[99] > 0
    assert all(a > b for a, b in pairwise(rates[4:]))
