"""Each learning rule against its paper's formula, worked out slowly."""

from __future__ import annotations

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from rule_cases import conv, digits, made, mlp, normed, train
from torch import Tensor, nn
from torch.nn import functional as F

from enn_core.orthogonality import orthogonality_error
from enn_core.rules import make_rule
from enn_core.rules.base import TrainerRule
from enn_core.rules.dfa import DirectFeedback, Feedback
from enn_core.rules.forward_forward import ForwardForward
from enn_core.rules.muon import MuonAdamW
from enn_core.rules.predsim import predsim_loss, similarity
from enn_core.rules.srip_ocnn import (
    gram_error,
    isometry,
    matrices,
    ocnn_penalty,
    self_convolution,
    srip_penalty,
)


def batch(size: int = 16) -> tuple[Tensor, Tensor]:
    x, y = digits()
    return x[:size], y[:size]


def local(name: str, model: nn.Module, **options: object) -> TrainerRule:
    rule = made(name, model, 10, **options)
    assert isinstance(rule, TrainerRule)
    return rule


# --- exact and soft ENN -------------------------------------------------------------------------


def test_enn_stays_orthonormal_and_the_penalty_does_not() -> None:
    drifts = {}
    for name in ("enn", "enn-penalty"):
        rule = made(name, mlp(), 60)
        train(rule, 60)
        drifts[name] = max(orthogonality_error(rule.network()).values())
    assert drifts["enn"] < 1e-3 < 0.05 < drifts["enn-penalty"]


def test_enn_starts_where_backprop_starts() -> None:
    x, _ = batch()
    start = mlp().eval()(x)
    for name in ("enn", "enn-penalty", "local-enn", "dgl", "muon", "mono-forward"):
        torch.testing.assert_close(made(name, mlp(), 10).scores(x), start, rtol=1e-4, atol=1e-5)


# --- optimizers ---------------------------------------------------------------------------------


def test_muon_steps_matrices_and_adamw_the_rest() -> None:
    model, twin = conv(), conv()
    ours = MuonAdamW(model, lr=1e-2, weight_decay=0.1)
    kernels = [p for p in twin.parameters() if p.ndim > 1]
    views = [nn.Parameter(p.detach().flatten(1)) for p in kernels]
    muon = torch.optim.Muon(views, lr=1e-2, weight_decay=0.1, adjust_lr_fn="match_rms_adamw")
    adamw = torch.optim.AdamW([p for p in twin.parameters() if p.ndim == 1], 1e-2, weight_decay=0)
    x, y = batch()
    for lr in (1e-2, 3e-3):
        for optimizer in (ours, muon, adamw):
            for group in optimizer.param_groups:
                group["lr"] = lr
        F.cross_entropy(model(x), y).backward()
        F.cross_entropy(twin(x), y).backward()
        for view, kernel in zip(views, kernels, strict=True):
            view.grad = kernel.grad.flatten(1).clone()  # type: ignore[union-attr]
        for optimizer in (ours, muon, adamw):
            optimizer.step()
        with torch.no_grad():
            for view, kernel in zip(views, kernels, strict=True):
                kernel.copy_(view.view_as(kernel))
        for net in (model, twin):
            net.zero_grad()
    for mine, theirs in zip(model.parameters(), twin.parameters(), strict=True):
        torch.testing.assert_close(mine, theirs, rtol=0, atol=0)


# --- orthogonal regularisers --------------------------------------------------------------------


@given(st.integers(2, 9), st.integers(2, 9), st.integers(0, 5))
@settings(max_examples=12, deadline=None)
def test_srip_is_the_spectral_norm_of_the_gram_error(rows: int, columns: int, seed: int) -> None:
    torch.manual_seed(seed)
    matrix = torch.randn(rows, columns, dtype=torch.float64)
    tall = matrix if rows >= columns else matrix.T
    wanted = torch.linalg.matrix_norm(tall.T @ tall - torch.eye(tall.shape[1]), 2)
    torch.testing.assert_close(isometry(matrix, 600), wanted, rtol=1e-3, atol=1e-6)
    assert isometry(matrix, 2) <= wanted + 1e-9  # power iteration comes from below


def test_srip_gradient_is_that_of_the_spectral_norm() -> None:
    torch.manual_seed(0)
    matrix = torch.randn(7, 4, dtype=torch.float64, requires_grad=True)
    (mine,) = torch.autograd.grad(isometry(matrix, 500), matrix)
    norm = torch.linalg.matrix_norm(matrix.T @ matrix - torch.eye(4), 2)
    (theirs,) = torch.autograd.grad(norm, matrix)
    torch.testing.assert_close(mine, theirs, rtol=1e-6, atol=1e-8)


@pytest.mark.parametrize(("kernel", "stride"), [(3, 1), (3, 2), (2, 1), (2, 2), (1, 1), (5, 2)])
def test_ocnn_is_the_overlap_of_the_rows_of_the_convolution_matrix(
    kernel: int, stride: int
) -> None:
    torch.manual_seed(kernel + stride)
    layer = nn.Conv2d(2, 3, kernel, stride, bias=False).double()
    side = 6 * kernel
    basis = torch.eye(2 * side * side, dtype=torch.float64).view(-1, 2, side, side)
    with torch.no_grad():
        columns = layer(basis)  # (inputs, 3, h, w)
    inputs, _, height, width = columns.shape
    rows = columns.reshape(inputs, -1).T  # one row per output
    middle = columns[:, :, height // 2, width // 2].T  # far from the border
    ones = torch.zeros(3, 3, height, width, dtype=torch.float64)
    ones[range(3), range(3), height // 2, width // 2] = 1
    wanted = ((middle @ rows.T).view(3, 3, height, width) - ones).square().sum()
    torch.testing.assert_close(self_convolution(layer), wanted)


def test_orthogonal_weights_cost_nothing() -> None:
    layer = nn.Conv2d(4, 4, 1).requires_grad_(False)
    nn.init.orthogonal_(layer.weight)
    assert float(self_convolution(layer)) == pytest.approx(0, abs=1e-5)
    wide = nn.init.orthogonal_(torch.empty(3, 8))
    for matrix in (wide, wide.T):
        assert float(gram_error(matrix)) == pytest.approx(0, abs=1e-5)
        assert float(isometry(matrix, 3)) == pytest.approx(0, abs=1e-5)


def test_regularisers_see_every_weight_once() -> None:
    torch.manual_seed(0)
    model = nn.Sequential(
        nn.Conv2d(3, 4, 3), nn.Conv2d(4, 4, 3, groups=4), nn.BatchNorm2d(4), nn.Linear(4, 5)
    )
    model.append(nn.MultiheadAttention(4, 2))
    model.append(model[3])  # shared
    shapes = [tuple(matrix.shape) for _, matrix in matrices(model)]
    assert shapes == [(4, 27), (4, 9), (5, 4), (12, 4), (4, 4)]
    for penalty in (srip_penalty(model, 0.5), ocnn_penalty(model, 0.5)):
        assert penalty.ndim == 0
        assert float(penalty.detach()) > 0


@pytest.mark.parametrize("name", ["srip", "ocnn"])
def test_regularisers_bring_weights_nearer_to_orthogonal(name: str) -> None:
    def distance(model: nn.Module) -> float:
        return float(sum(gram_error(matrix.detach()) for _, matrix in matrices(model)))

    errors = []
    for strength in (1e-9, 1.0):
        rule = made(name, mlp(), 60, coefficient=strength)
        train(rule, 60)
        errors.append(distance(rule.network()))
    assert errors[1] < 0.5 * errors[0]


# --- local rules --------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["dgl", "local-enn", "predsim", "mono-forward"])
def test_no_gradient_between_blocks(name: str) -> None:
    x, y = batch()
    rule = local(name, normed())
    assert len(rule.blocks) >= 4
    task = rule.trainer.learners[0].recipe.task
    for index, block in enumerate(rule.blocks):
        h = x
        for before in rule.blocks[:index]:
            h = before(h)[0]
        task(block(h)[1], y).backward()
        for other, candidate in enumerate(rule.blocks):
            grads = [p.grad for p in candidate.parameters()]
            if other == index:
                assert all(g is not None for g in grads)
            else:
                assert all(g is None for g in grads)
        block.zero_grad(set_to_none=True)


def test_dgl_and_local_enn_are_cut_alike_with_the_same_heads() -> None:
    plain, eigen = local("dgl", normed()), local("local-enn", normed())
    for a, b in zip(plain.blocks, eigen.blocks, strict=True):
        pairs = zip(a.head.parameters(), b.head.parameters(), strict=True)
        assert all(torch.equal(p, q) for p, q in pairs)


def test_predsim_loss_by_hand() -> None:
    torch.manual_seed(0)
    scores, vectors = torch.randn(5, 3), torch.randn(5, 4)
    y = torch.tensor([0, 2, 1, 0, 2])
    total = 0.0
    for i in range(5):
        for j in range(5):
            total += (cosine(vectors, i, j) - cosine(F.one_hot(y, 3).float(), i, j)) ** 2
    wanted = 0.01 * F.cross_entropy(scores, y) + 0.99 * total / 25
    torch.testing.assert_close(predsim_loss((scores, vectors), y, 0.99, 3), wanted)
    assert predsim_loss(scores, y, 0.99, 3) == F.cross_entropy(scores, y)
    torch.testing.assert_close(similarity(vectors).diagonal(), torch.ones(5))


def cosine(vectors: Tensor, i: int, j: int) -> Tensor:
    a, b = (vectors[k] - vectors[k].mean() for k in (i, j))
    return (a @ b) / (a.norm() * b.norm())


def test_mono_forward_layers_learn_from_their_projections() -> None:
    x, y = batch()
    model, twin = mlp(), mlp()
    rule = local("mono-forward", model)
    layers = [twin[:3], twin[3:5], twin[5:7], twin[7:]]
    assert len(rule.blocks) == len(layers)
    h = x
    for block, layer in zip(rule.blocks, layers, strict=True):
        a = layer(h)
        if layer is not layers[-1]:
            M = block.head[1].weight.detach()  # type: ignore[index]
            assert M.shape == (10, a.shape[1])
            goodness = a @ M.T
        else:
            goodness = a
        loss = -goodness.log_softmax(1)[range(len(y)), y].mean()
        wanted = torch.autograd.grad(loss, list(layer.parameters()))
        mine = torch.autograd.grad(F.cross_entropy(block(h)[1], y), list(block.block.parameters()))
        for g, w in zip(mine, wanted, strict=True):
            torch.testing.assert_close(g, w)
        h = a.detach()


# --- feedback alignment, Forward-Forward --------------------------------------------------------


def test_dfa_update_by_hand() -> None:
    """delta a_3 = e, delta a_i = (B_i e) * relu'(a_i), dW_i = mean of delta a_i h_{i-1}^T."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(5, 7), nn.ReLU(), nn.Linear(7, 6), nn.ReLU(), nn.Linear(6, 3))
    x, y = torch.randn(9, 5), torch.randint(3, (9,))
    weights = [layer.weight.detach().clone() for layer in (model[0], model[2], model[4])]
    biases = [layer.bias.detach().clone() for layer in (model[0], model[2], model[4])]
    rule = make_rule("dfa", model, x, 3, lr=1e-3, steps=10)
    assert isinstance(rule, DirectFeedback)
    first, second = (block.head for block in rule.blocks[:2])
    assert isinstance(first, Feedback)
    assert isinstance(second, Feedback)
    gradients: list[Tensor] = []
    for learner in rule.trainer.learners:
        learner.optimizer.register_step_pre_hook(  # type: ignore[union-attr]
            lambda optimizer, *_: gradients.extend(
                p.grad.clone() for group in optimizer.param_groups for p in group["params"]
            )
        )
    loss = rule.step(x, y)

    a1 = x @ weights[0].T + biases[0]
    h1 = a1.clamp(min=0)
    a2 = h1 @ weights[1].T + biases[1]
    h2 = a2.clamp(min=0)
    scores = h2 @ weights[2].T + biases[2]
    e = scores.softmax(1) - torch.eye(3)[y]
    d2 = (e @ second.B.T) * (a2 > 0)
    d1 = (e @ first.B.T) * (a1 > 0)
    wanted = []
    for delta, h in ((d1, x), (d2, h1), (e, h2)):
        wanted += [delta.T @ h / 9, delta.mean(0)]
    assert loss == pytest.approx(float(F.cross_entropy(scores, y)), rel=1e-5)
    for mine, theirs in zip(gradients, wanted, strict=True):
        torch.testing.assert_close(mine, theirs)


def test_forward_forward_loss_by_hand() -> None:
    x, y = batch(6)
    rule = made("forward-forward", mlp(), 10)
    assert isinstance(rule, ForwardForward)
    labels = rule.network().labels  # type: ignore[union-attr]
    marked = labels(x, y)
    assert torch.equal(marked.flatten(1)[:, 10:], x.flatten(1)[:, 10:])
    assert torch.equal(marked.flatten(1)[:, :10].argmax(1), y)
    twin = mlp()
    h = marked.flatten(1)
    passed, total = marked, torch.zeros(6)
    for index, layer in enumerate((twin[1], twin[3], twin[5])):
        if index:
            h = h / h.norm(dim=1, keepdim=True) * math.sqrt(h.shape[1])
        h = layer(h).relu()
        goodness = h.square().sum(1) - 0.2 * h.shape[1]
        passed, mine = rule.blocks[index](passed)
        torch.testing.assert_close(mine, goodness, rtol=1e-4, atol=1e-4)
        if index:
            total += goodness
        # -log p(true label is true) - log p(wrong label is wrong)
        signs = torch.tensor([1.0, -1.0] * 3)
        p = torch.sigmoid(goodness)
        wanted = -torch.where(signs > 0, p, 1 - p).log().mean()
        task = rule.trainer.learners[index].recipe.task
        torch.testing.assert_close(task(mine, signs), wanted, rtol=1e-3, atol=1e-3)
    torch.testing.assert_close(rule.scores(x)[range(6), y], total.detach(), rtol=1e-4, atol=1e-3)


def test_forward_forward_draws_wrong_labels_only() -> None:
    x, y = batch(64)
    rule = made("forward-forward", conv(), 10)
    assert isinstance(rule, ForwardForward)
    labels = rule.network().labels  # type: ignore[union-attr]
    seen: list[Tensor] = []
    rule.blocks[0].register_forward_pre_hook(lambda _, args: seen.append(args[0]))
    rule.step(x, y)
    true, wrong = seen[0].chunk(2)
    assert torch.equal(true, labels(x, y))
    marks = (wrong - x).flatten(1)[:, None] - labels.patterns.flatten(1)
    drawn = marks.norm(dim=2).argmin(1)
    assert bool((drawn != y).all())
    assert len(drawn.unique()) > 5
