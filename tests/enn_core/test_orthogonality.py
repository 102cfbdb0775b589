"""Penalty, error and retraction."""

from __future__ import annotations

import copy
import warnings

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn
from torch.optim.swa_utils import AveragedModel, get_ema_multi_avg_fn

from enn_core import (
    ENNConv2d,
    ENNLinear,
    Retraction,
    orthogonality_error,
    orthogonality_penalty,
    param_groups,
    retract_,
    to_enn,
)
from enn_core.averages import keep_as_they_are
from enn_core.orthogonality import METHODS


def _oracle(model: nn.Module) -> torch.Tensor:
    """The paper's sum, by autograd."""
    total = torch.zeros((), dtype=torch.float64)
    for name, factor in model.named_parameters():
        if name.rpartition(".")[2] in ("Q", "P"):
            gram = factor.mT @ factor
            total = total + (gram - torch.eye(gram.shape[-1], dtype=gram.dtype)).square().sum()
    return total


def _drifted(*shape: int, scale: float, dtype=torch.float64, seed: int = 0) -> ENNLinear:
    """A layer whose factors left the orthonormal matrices by about `scale` (spectral norm)."""
    torch.manual_seed(seed)
    layer = ENNLinear(*shape, dtype=dtype)
    with torch.no_grad():
        for factor in (layer.Q, layer.P):
            noise = torch.randn(factor.shape, dtype=torch.float64)
            factor.add_((noise * scale / torch.linalg.matrix_norm(noise, 2)).to(dtype))
    return layer


@settings(max_examples=25)
@given(
    m=st.integers(1, 9),
    n=st.integers(1, 9),
    groups=st.integers(1, 3),
    scale=st.floats(0, 2),
    coefficient=st.floats(1e-4, 10),
)
def test_penalty_equals_the_autograd_oracle(m, n, groups, scale, coefficient) -> None:
    conv = ENNConv2d(groups * n, groups * m, 2, groups=groups, dtype=torch.float64)
    model = nn.Sequential(_drifted(m, n, scale=scale), conv)
    ours = orthogonality_penalty(model, coefficient)
    theirs = coefficient * _oracle(model)
    torch.testing.assert_close(ours, theirs)
    bases = [p for name, p in model.named_parameters() if name[-1] in "QP"]
    torch.testing.assert_close(
        torch.autograd.grad(ours, bases), torch.autograd.grad(theirs, bases), atol=1e-8, rtol=1e-6
    )


def test_penalty_gradient_is_the_closed_form() -> None:
    layer = _drifted(5, 3, scale=0.5)
    orthogonality_penalty(layer, 1.0).backward()
    Q = layer.Q.detach()
    torch.testing.assert_close(layer.Q.grad, 4 * Q @ (Q.T @ Q - torch.eye(3).double()))
    assert layer.Lambda.grad is None


def test_penalty_can_be_differentiated_twice() -> None:
    layer = _drifted(5, 3, scale=0.5)
    grads = []
    for penalty in (orthogonality_penalty(layer, 1.0), _oracle(layer)):
        (first,) = torch.autograd.grad(penalty, layer.Q, create_graph=True)
        grads.append(torch.autograd.grad(first.pow(3).sum(), layer.Q)[0])
    torch.testing.assert_close(*grads)


def test_penalty_of_half_precision_and_under_autocast_is_computed_in_float32() -> None:
    layer = _drifted(64, 64, scale=0.1, dtype=torch.float32)
    expected = orthogonality_penalty(layer, 1.0)
    with torch.autocast("cpu", torch.bfloat16):
        assert torch.equal(orthogonality_penalty(layer, 1.0), expected)
    half = _drifted(64, 64, scale=0.1, dtype=torch.bfloat16)
    penalty = orthogonality_penalty(half, 1.0)
    assert penalty.dtype == torch.float32
    penalty.backward()
    assert half.Q.grad.dtype == torch.bfloat16


def test_penalty_of_a_plain_model_is_zero() -> None:
    assert orthogonality_penalty(nn.Linear(3, 3)).item() == 0


def test_penalty_counts_shared_factors_once() -> None:
    layer = _drifted(5, 3, scale=0.5)
    one, two = orthogonality_penalty(layer), orthogonality_penalty(nn.Sequential(layer, layer))
    assert torch.equal(one, two)


def test_error_names_every_factor() -> None:
    layer = ENNLinear(6, 4)
    with torch.no_grad():
        layer.Q.mul_(2**0.5)  # Q^T Q = 2 I
    model = nn.Sequential(layer, nn.ReLU(), nn.MultiheadAttention(4, 2))
    report = orthogonality_error(to_enn(model))
    assert list(report) == [
        "0.Q",
        "0.P",
        "2.out_proj.Q",
        "2.out_proj.P",
        "2.in_proj_weight_eigen.Q",
        "2.in_proj_weight_eigen.P",
    ]
    assert report["0.Q"] == pytest.approx(1, abs=1e-5)
    assert report["0.P"] < 1e-5


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("scale", [0.0, 0.02, 0.2, 0.6, 3.0])
@pytest.mark.parametrize("shape", [(24, 24), (40, 12), (12, 40)])
def test_every_retraction_reaches_the_bound_from_anywhere(method, scale, shape) -> None:
    layer = _drifted(*shape, scale=scale)
    start = orthogonality_error(layer)
    before = retract_(layer, method, bound=1e-3)
    assert before == pytest.approx(start)
    assert max(orthogonality_error(layer).values()) <= 1e-3


@settings(max_examples=40)
@given(
    values=st.lists(st.floats(0.05, 2.5), min_size=2, max_size=12),
    method=st.sampled_from(METHODS),
    bound=st.sampled_from([1e-2, 1e-4, 1e-6]),
)
def test_any_spectrum_is_retracted(values, method, bound) -> None:
    layer = ENNLinear(16, len(values), dtype=torch.float64)
    with torch.no_grad():
        layer.P.mul_(torch.tensor(values, dtype=torch.float64))
    retract_(layer, method, bound=bound)
    assert max(orthogonality_error(layer).values()) <= bound


def test_newton_schulz_finds_the_nearest_orthonormal_matrix() -> None:
    layer = _drifted(20, 20, scale=0.2)
    U, _, Vh = torch.linalg.svd(layer.Q.detach())
    retract_(layer, "newton-schulz", bound=1e-9)
    torch.testing.assert_close(layer.Q.detach(), U @ Vh, atol=1e-7, rtol=0)


def test_qr_keeps_the_sense_of_every_column() -> None:
    layer = _drifted(20, 20, scale=0.1)
    before = layer.Q.detach().clone()
    retract_(layer, "qr")
    assert bool(((before * layer.Q).sum(0) > 0.9).all())


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("method", METHODS)
def test_half_precision_is_retracted_in_float32(dtype, method) -> None:
    layer = _drifted(256, 64, scale=0.3, dtype=dtype)
    with torch.autocast("cpu", torch.bfloat16):
        retract_(layer, method)
    assert layer.Q.dtype == dtype
    # Rounding to bfloat16 alone costs about 1.6e-3.
    assert max(orthogonality_error(layer).values()) <= 5e-3


def test_grouped_and_packed_factors_are_retracted() -> None:
    model = to_enn(nn.Sequential(nn.Conv2d(8, 8, 3, groups=2), nn.MultiheadAttention(8, 2)))
    with torch.no_grad():
        for p in model.parameters():
            p.add_(torch.randn_like(p) * 0.05)
    retract_(model)
    assert max(orthogonality_error(model).values()) <= 1e-3


def test_frozen_factors_are_left_alone() -> None:
    layer = _drifted(5, 3, scale=0.5)
    layer.Q.requires_grad_(False)
    before = layer.Q.clone()
    assert list(retract_(layer)) == ["P"]
    assert torch.equal(layer.Q, before)


def test_retraction_reaches_a_cached_eval_layer() -> None:
    layer = _drifted(5, 3, scale=0.5).eval()
    with torch.no_grad():
        stale = layer.weight.clone()
        retract_(layer)
        assert not torch.equal(layer.weight, stale)


def test_unknown_methods_and_intervals_are_refused() -> None:
    layer = ENNLinear(3, 3)
    with pytest.raises(ValueError, match=r"'cayley' is unknown, valid are newton-schulz"):
        retract_(layer, "cayley")
    optimizer = torch.optim.SGD(layer.parameters(), lr=0.1)
    with pytest.raises(ValueError, match="every=0"):
        Retraction(optimizer, layer, every=0)
    with pytest.raises(ValueError, match="'cayley' is unknown"):
        Retraction(optimizer, layer, method="cayley")


def test_the_hook_counts_steps_and_can_be_removed() -> None:
    layer = ENNLinear(6, 4)
    optimizer = torch.optim.SGD(layer.parameters(), lr=0.05)
    retraction = Retraction(optimizer, layer, every=3)

    def step() -> float:
        optimizer.zero_grad()
        layer(torch.ones(2, 6)).square().sum().backward()
        optimizer.step()
        return max(orthogonality_error(layer).values())

    errors = [step() for _ in range(6)]
    assert errors[1] > 1e-3
    assert errors[2] <= 1e-3
    assert errors[5] <= 1e-3
    assert retraction.steps == 6
    assert set(retraction.last_error) == {"Q", "P"}
    retraction.remove()
    step()
    assert retraction.steps == 6


OPTIMIZERS = {
    "sgd": lambda groups: torch.optim.SGD(groups, lr=0.05, momentum=0.9),
    "adamw": lambda groups: torch.optim.AdamW(groups, lr=1e-3),
    "adamw-high": lambda groups: torch.optim.AdamW(groups, lr=1e-2),
    "rmsprop": lambda groups: torch.optim.RMSprop(groups, lr=1e-3),
}


@pytest.mark.parametrize("every", [1, 10])
@pytest.mark.parametrize("optimizer", OPTIMIZERS)
def test_after_200_steps_every_layer_is_orthonormal(optimizer, every) -> None:
    """The project's bar: ||Q^T Q - I||_F / sqrt(r) <= 5e-3 in every layer; no retraction drifts."""
    errors = {}
    for retracted in (True, False):
        torch.manual_seed(0)
        model = to_enn(
            nn.Sequential(
                nn.Conv2d(1, 16, 3, stride=2),
                nn.ReLU(),
                nn.Flatten(),
                nn.Linear(144, 64),
                nn.GELU(),
                nn.Linear(64, 32),
            )
        )
        target = nn.Linear(64, 32)
        step = OPTIMIZERS[optimizer](param_groups(model))
        if retracted:
            Retraction(step, model, every=every)
        for _ in range(200):
            x = torch.randn(32, 1, 8, 8)
            step.zero_grad()
            (model(x) - target(x.flatten(1))).square().mean().backward()
            step.step()
        errors[retracted] = max(orthogonality_error(model).values())
    assert errors[True] <= 5e-3
    assert errors[False] > errors[True]


def test_the_vit_layers_of_torch_stay_orthonormal() -> None:
    torch.manual_seed(0)
    block = nn.TransformerEncoderLayer(64, 4, 256, dropout=0.0, batch_first=True)
    model = to_enn(nn.TransformerEncoder(block, 2))
    optimizer = torch.optim.AdamW(param_groups(model, lr=1e-3))
    Retraction(optimizer, model, every=10)
    for _ in range(200):
        x = torch.randn(4, 16, 64)
        optimizer.zero_grad()
        (model(x) - x.roll(1, 1)).square().mean().backward()
        optimizer.step()
    report = orthogonality_error(model)
    assert len(report) == 2 * 2 * 4
    assert max(report.values()) <= 5e-3


def test_the_usual_checkpoint_resumes_to_the_bit() -> None:
    x = torch.randn(64, 32)

    def make():
        torch.manual_seed(0)
        model = to_enn(nn.Sequential(nn.Linear(32, 32), nn.ReLU(), nn.Linear(32, 4)))
        optimizer = torch.optim.AdamW(param_groups(model, lr=1e-2))
        return model, optimizer, [Retraction(optimizer, part, 4) for part in (model[0], model[2])]

    def go(model, optimizer) -> None:
        for _ in range(7):
            optimizer.zero_grad()
            (model(x) - x[:, :4]).square().mean().backward()
            optimizer.step()

    model, optimizer, _ = make()
    go(model, optimizer)
    saved = copy.deepcopy((model.state_dict(), optimizer.state_dict()))
    go(model, optimizer)
    again, optimizer, retractions = make()
    again.load_state_dict(saved[0])
    optimizer.load_state_dict(saved[1])
    go(again, optimizer)
    assert [r.steps for r in retractions] == [14, 14]
    for one, other in zip(model.parameters(), again.parameters(), strict=True):
        assert torch.equal(one, other)


class TestParamGroups:
    def test_decay_falls_on_spectra_and_plain_weights_alone(self) -> None:
        model = nn.Sequential(
            nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4), nn.Conv2d(4, 4, 3, groups=4), nn.Linear(4, 2)
        )
        eigen = to_enn(model)
        decayed, others = param_groups(eigen, lr=0.1, weight_decay=0.3)
        names = {id(p): name for name, p in eigen.named_parameters()}
        assert [names[id(p)] for p in decayed["params"]] == ["0.Lambda", "2.weight", "3.Lambda"]
        assert {names[id(p)] for p in others["params"]} == {
            "0.Q", "0.P", "0.bias", "1.weight", "1.bias", "2.bias", "3.Q", "3.P", "3.bias",
        }  # fmt: skip
        assert (decayed["weight_decay"], others["weight_decay"]) == (0.3, 0.0)
        assert decayed["lr"] == others["lr"] == 0.1
        torch.optim.AdamW([decayed, others])

    def test_frozen_parameters_are_left_out(self) -> None:
        layer = ENNLinear(3, 3)
        for p in (layer.Q, layer.Lambda, layer.P):
            p.requires_grad_(False)
        (group,) = param_groups(layer)
        assert [p is layer.bias for p in group["params"]] == [True]
        assert "lr" not in group

    def test_grouped_spectra_decay(self) -> None:
        layer = ENNConv2d(4, 4, 3, groups=2, bias=False)
        decayed, others = param_groups(layer)
        assert decayed["params"][0] is layer.Lambda
        assert {id(p) for p in others["params"]} == {id(layer.Q), id(layer.P)}


# --- averages ------------------------------------------------------------------------------------


class ScheduleFreeStandIn(torch.optim.SGD):
    """The protocol of `schedulefree`'s optimizers: `train()` holds y, `eval()` the average x."""

    beta = 0.9

    def _swap(self, to_train: bool, weight: float) -> None:
        group = self.param_groups[0]
        if group.get("train_mode", False) != to_train:
            group["train_mode"] = to_train
            for parameter in group["params"]:
                if "z" in self.state[parameter]:
                    with torch.no_grad():
                        parameter.lerp_(self.state[parameter]["z"], weight)

    def eval(self) -> None:
        self._swap(False, 1 - 1 / self.beta)

    def train(self) -> None:
        self._swap(True, 1 - self.beta)

    @torch.no_grad()
    def step(self, closure=None) -> None:
        group = self.param_groups[0]
        assert group["train_mode"]
        group["k"] = group.get("k", 0) + 1
        for y in group["params"]:
            z = self.state[y].setdefault("z", y.clone())
            y.lerp_(z, 1 / group["k"])
            y.add_(y.grad, alpha=group["lr"] * (self.beta * (1 - 1 / group["k"]) - 1))
            z.sub_(y.grad, alpha=group["lr"])


X = torch.randn(64, 32, generator=torch.Generator().manual_seed(1))


def _net() -> nn.Module:
    torch.manual_seed(0)
    return to_enn(nn.Sequential(nn.Linear(32, 64), nn.ReLU(), nn.Linear(64, 4)))


def _train(model, optimizer, steps: int, each=lambda: None) -> None:
    for _ in range(steps):
        optimizer.zero_grad()
        (model(X) - X[:, :4].roll(1, 1)).square().mean().backward()
        optimizer.step()
        each()


def _error(model: nn.Module) -> float:
    return max(orthogonality_error(model).values())


def _warns(model: nn.Module, *, grad: bool = False) -> list[str]:
    with warnings.catch_warnings(record=True) as caught, torch.set_grad_enabled(grad):
        warnings.simplefilter("always")
        model(X)
    return [str(each.message) for each in caught]


def test_what_a_schedule_free_optimizer_evaluates_is_orthonormal() -> None:
    model = _net()
    optimizer = ScheduleFreeStandIn(model.parameters(), lr=2.0)
    other = Retraction(optimizer, nn.Linear(2, 2), every=10)
    retraction = Retraction(optimizer, model, every=1)
    optimizer.train()
    _train(model, optimizer, 60)
    before = _error(model)
    optimizer.eval()
    assert max(retraction.last_error.values()) > 0.05  # of the average
    assert max(before, _error(model)) <= 1e-3
    held = copy.deepcopy(model.state_dict())
    optimizer.eval()  # again: nothing changes
    assert all(torch.equal(held[key], value) for key, value in model.state_dict().items())
    assert _warns(model.eval()) == []
    # A checkpoint of what is evaluated resumes to the bit.
    again = _net()
    resumed = ScheduleFreeStandIn(again.parameters(), lr=2.0)
    Retraction(resumed, nn.Linear(2, 2), every=10)
    Retraction(resumed, again, every=1)
    again.load_state_dict(held)
    resumed.load_state_dict(copy.deepcopy(optimizer.state_dict()))
    for each, by in ((model, optimizer), (again, resumed)):
        by.train()
        _train(each.train(), by, 7)
    assert all(map(torch.equal, model.parameters(), again.parameters()))
    other.remove()
    retraction.remove()
    optimizer.eval()
    assert _error(model) > 1e-2


AVERAGES = {
    "ema": lambda model: AveragedModel(model, multi_avg_fn=get_ema_multi_avg_fn(0.999)),
    "swa": AveragedModel,
    "copied": copy.deepcopy,
}


@pytest.mark.parametrize("grad", [False, True])
@pytest.mark.parametrize("before", [False, True])
@pytest.mark.parametrize("kind", AVERAGES)
def test_averages_warn_in_one_line_until_they_are_retracted(kind, before: bool, grad: bool) -> None:
    """Whether the average was made before the retraction or after it."""
    model = _net()
    optimizer = torch.optim.AdamW(param_groups(model, lr=1e-2))
    average = AVERAGES[kind](model) if before else None
    Retraction(optimizer, model, every=1)
    average = (average or AVERAGES[kind](model)).eval()

    def update() -> None:
        if kind != "copied":
            average.update_parameters(model)
            return
        with torch.no_grad():
            for mean, new in zip(average.parameters(), model.parameters(), strict=True):
                mean.lerp_(new, 0.01)

    _train(model, optimizer, 200, update)
    assert _error(average) > 1e-2
    said = _warns(average, grad=grad)
    assert said
    assert all("call retract_(model)" in line and "\n" not in line for line in said)
    assert _warns(average, grad=grad) == []  # nothing has changed since
    assert _warns(model.eval(), grad=grad) == []
    trained = copy.deepcopy(model.state_dict())
    retract_(average)
    assert _warns(average, grad=grad) == []
    assert all(torch.equal(trained[key], value) for key, value in model.state_dict().items())
    _train(model.train(), optimizer, 1)
    update()
    assert _error(average) < 0.05  # the average goes on


def test_an_average_that_is_swapped_into_the_model_warns() -> None:
    model = _net()
    optimizer = torch.optim.AdamW(param_groups(model, lr=1e-2))
    retraction = Retraction(optimizer, model)
    average = AveragedModel(model, multi_avg_fn=get_ema_multi_avg_fn(0.999))
    _train(model, optimizer, 200, lambda: average.update_parameters(model))
    model.load_state_dict(average.module.state_dict())
    assert _warns(model.eval())
    retraction.remove()
    retraction.remove()
    model.load_state_dict(average.module.state_dict())
    assert _warns(model) == []  # nobody holds it any more


def test_one_warning_for_all_layers() -> None:
    trained = _net()
    Retraction(torch.optim.SGD(trained.parameters(), lr=0.1), trained)
    model = copy.deepcopy(trained).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.mul_(0.9)
    meant = copy.deepcopy(model)
    with warnings.catch_warnings(record=True) as caught, torch.no_grad():
        warnings.simplefilter("default")
        model(X)
    assert len(caught) == 1
    keep_as_they_are(meant)
    assert _warns(meant) == []


@pytest.mark.parametrize("penalty", [0, 2e-4])
def test_training_without_retraction_does_not_warn(penalty: float) -> None:
    """To retract a model that was trained without would harm it."""
    model = _net()
    other = _net()
    Retraction(torch.optim.SGD(other.parameters(), lr=0.1), other)
    optimizer = torch.optim.AdamW(param_groups(model, lr=1e-2))
    for _ in range(100):
        optimizer.zero_grad()
        loss = (model(X) - X[:, :4]).square().mean()
        (loss + orthogonality_penalty(model, penalty)).backward()
        optimizer.step()
    assert _error(model) > 0.1
    assert _warns(model.eval()) == []


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_rounding_is_no_average(dtype) -> None:
    model = _net()
    retraction = Retraction(torch.optim.SGD(model.parameters(), lr=0.1), model)
    rounded = copy.deepcopy(model).to(dtype).float().eval()
    assert _warns(rounded) == []
    assert retraction.steps == 0


def test_a_held_model_may_be_evaluated_between_two_retractions() -> None:
    model = _net()
    optimizer = torch.optim.AdamW(param_groups(model, lr=1e-3))
    Retraction(optimizer, model)
    _train(model, optimizer, 19)
    assert _error(model) > 1e-2
    assert _warns(model.eval()) == []
