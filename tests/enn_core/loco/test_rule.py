"""LOCO as a rule: it learns without autograd, resumes to the bit, and refuses what it cannot."""

from __future__ import annotations

import copy
import io
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from enn_core import fuse, to_enn
from enn_core.loco import LOCO, PROJECTIONS, UnsupportedModel, calibrate_, to_stages
from enn_core.spiking import IF, ClampedReLU, Encode, spiking_twin


def blobs(count: int = 96, seed: int = 0) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(seed)
    y = torch.arange(count) % 3
    return torch.eye(3)[y].repeat(1, 2) + 0.2 * torch.rand(count, 6, generator=generator), y


def mlp(depth: int = 3, width: int = 24) -> nn.Sequential:
    torch.manual_seed(0)
    layers: list[nn.Module] = []
    for index in range(depth - 1):
        layers += [nn.Linear(6 if index == 0 else width, width), ClampedReLU()]
    return nn.Sequential(*layers, nn.Linear(width, 3))


@pytest.mark.parametrize("projection", PROJECTIONS)
def test_learns_under_inference_mode(projection: Any) -> None:
    x, y = blobs()
    model = mlp()
    calibrate_(model, x)
    rule = LOCO(model, lr=1e-2, steps=150, projection=projection, loss="ce", buffer=50)
    with torch.inference_mode():
        for _ in range(150):
            rule.step(x, y)
    assert float((rule.scores(x).argmax(1) == y).float().mean()) > 0.95
    assert all(p.grad is None for p in model.parameters())
    model(x).sum().backward()  # the weights are still ordinary parameters


@pytest.mark.parametrize("train", [True, False])
@pytest.mark.parametrize("projection", ["loco", "mean", "none"])
def test_eigen_layers_learn_as_plain_ones_do(projection: Any, train: bool) -> None:
    x, y = blobs()
    plain = mlp().train(train)
    eigen = to_enn(plain)
    for model in (plain, eigen):
        torch.manual_seed(0)
        calibrate_(model, x)
        rule = LOCO(model, lr=1e-2, steps=10, projection=projection, loss="ce", buffer=50)
        for _ in range(10):
            rule.step(x, y)
    for one, other in zip(to_stages(fuse(eigen))[1], to_stages(plain)[1], strict=True):
        torch.testing.assert_close(one.matrix(), other.matrix(), atol=2e-3, rtol=1e-3)


def test_eleven_layers_of_digits() -> None:
    """A short run: the long one is the benchmark's."""
    from sklearn.datasets import load_digits

    images, labels = load_digits(return_X_y=True)
    x, y = torch.tensor(images).float() / 16, torch.tensor(labels)
    torch.manual_seed(0)
    layers: list[nn.Module] = []
    for _ in range(10):
        layers += [nn.Linear(64, 64), ClampedReLU()]
    model = nn.Sequential(*layers, nn.Linear(64, 10))
    calibrate_(model, x[:300])
    rule = LOCO(model, lr=3e-3, steps=100, projection="mean", loss="ce")
    with torch.inference_mode():
        for step in range(100):
            rule.step(x[step * 13 : step * 13 + 64], y[step * 13 : step * 13 + 64])
    assert float((rule.scores(x[1400:]).argmax(1) == y[1400:]).float().mean()) > 0.5


@pytest.mark.parametrize("optimizer", ["adam", "sgd"])
def test_one_update_is_the_projected_direction(optimizer: Any) -> None:
    """First step: Adam moves by the sign of the gradient, SGD by the gradient."""
    from enn_core.local import random_stream
    from enn_core.loco import Perturbation, perturb
    from enn_core.loco.node_perturbation import LOSSES

    x, y = blobs()
    model = mlp()
    rule = LOCO(model, lr=0.1, steps=0, optimizer=optimizer, projection="mean", seed=7)
    before = [stage.matrix() for stage in rule.stages]
    with torch.inference_mode(), random_stream(x.device, 7, 0):
        estimates, _ = perturb(*to_stages(model), x, y, LOSSES["mse"], Perturbation())
    rule.step(x, y)
    for stage, old, estimate in zip(rule.stages, before, estimates, strict=True):
        direction = estimate.gradient()
        if optimizer == "adam":
            direction = direction / (direction.abs() + 1e-8)
        mean = estimate.rows.flatten(0, 1).mean(0)
        P = torch.eye(len(mean)) - torch.outer(mean, mean) / (mean @ mean)
        torch.testing.assert_close(stage.matrix() - old, -0.1 * direction @ P, atol=1e-5, rtol=1e-3)


@pytest.mark.parametrize("projection", ["loco", "mean"])
@pytest.mark.parametrize("optimizer", ["adam", "sgd"])
def test_resumes_to_the_bit(projection: Any, optimizer: Any) -> None:
    x, y = blobs()
    options: dict[str, Any] = {"lr": 1e-2, "steps": 40, "buffer": 12, "every": 3}
    options |= {"projection": projection, "optimizer": optimizer}
    rule = LOCO(mlp(), **options)
    for _ in range(15):
        rule.step(x, y)
    file = io.BytesIO()
    torch.save(rule.state_dict(), file)
    file.seek(0)
    other = LOCO(mlp(), **options)
    other.load_state_dict(torch.load(file, weights_only=True))
    for _ in range(10):
        torch.rand(3)  # the global stream does not matter
        assert rule.step(x, y) == other.step(x, y)
    for a, b in zip(rule.network().parameters(), other.network().parameters(), strict=True):
        assert torch.equal(a, b)


def test_state_is_of_its_moment() -> None:
    x, y = blobs()
    rule = LOCO(mlp(), lr=1e-2, steps=0, projection="cluster", buffer=10, every=1)
    for _ in range(12):
        rule.step(x, y)
    state = rule.state_dict()
    held = copy.deepcopy(state["projections"])
    for _ in range(12):
        rule.step(x, y)
    for then, now in zip(held, state["projections"], strict=True):
        assert torch.equal(then["ring"], now["ring"])


@pytest.mark.parametrize(
    "neurons", [ClampedReLU, nn.ReLU, nn.Tanh, lambda: IF(8)], ids=["rate", "relu", "tanh", "if"]
)
def test_calibration_centres_every_unit(neurons: Any) -> None:
    torch.manual_seed(0)
    x = torch.rand(300, 1, 6, 6)
    layers = [nn.Conv2d(1, 5, 3), neurons(), nn.Flatten(), nn.Linear(80, 40), neurons()]
    model = nn.Sequential(*layers, nn.Linear(40, 4))
    if isinstance(layers[1], IF):
        model = spiking_twin(nn.Sequential(*layers, nn.Linear(40, 4)), 8)
    calibrate_(model, x, spread=0.2)
    stage = to_stages(model)[1][0]
    z = stage.layer(x).detach().transpose(0, 1).flatten(1)
    low, high = stage.linear or (-0.5, 0.5)
    low, high = (-2.0, 2.0) if high == float("inf") else (low, high)
    torch.testing.assert_close(z.mean(1), torch.full((5,), (low + high) / 2), atol=1e-4, rtol=0)
    spread = (z - z.mean(1, keepdim=True)).square().mean().sqrt()
    assert float(spread) == pytest.approx(0.2 * (high - low), rel=1e-3)


def test_an_activation_used_twice_is_applied_twice() -> None:
    neuron = ClampedReLU()
    body = nn.Sequential(nn.Linear(6, 4), neuron, nn.Linear(4, 4), neuron)
    stages = to_stages(nn.Sequential(body, nn.Linear(4, 3)))[1]
    assert [stage.after for stage in stages] == [[neuron], [neuron], []]
    assert [stage.name for stage in stages] == ["0.0", "0.2", "1"]


REFUSED = {
    "norm": nn.Sequential(nn.Linear(4, 4), nn.BatchNorm1d(4)),
    "attention": nn.Sequential(nn.MultiheadAttention(4, 2)),
    "dropout": nn.Sequential(nn.Linear(4, 4), nn.Dropout()),
    "groups": nn.Sequential(nn.Conv2d(4, 4, 3, groups=2)),
    "padding": nn.Sequential(nn.Conv2d(4, 4, 3, padding="same")),
    "branches": nn.ModuleList([nn.Linear(4, 4)]),
    "no layer": nn.Sequential(nn.ReLU()),
    "two clocks": nn.Sequential(Encode(2), nn.Linear(4, 4), IF(3)),
    "parametrized": nn.Sequential(nn.utils.parametrizations.orthogonal(nn.Linear(4, 4))),
}


@pytest.mark.parametrize("name", REFUSED)
def test_refuses_what_it_cannot_train(name: str) -> None:
    with pytest.raises(UnsupportedModel) as caught:
        LOCO(REFUSED[name], lr=1e-3, steps=10)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("options", "word"),
    [
        ({"lr": 0.0}, "lr must be above 0"),
        ({"steps": -1}, "steps must be at least 0"),
        ({"optimizer": "lion"}, "adam or sgd"),
        ({"classes": 4}, "3 scores for 4 classes"),
        ({"loss": "hinge"}, "one of mse, ce"),
    ],
)
def test_bad_settings(options: dict[str, Any], word: str) -> None:
    with pytest.raises(ValueError, match=word):
        LOCO(mlp(), **{"lr": 1e-3, "steps": 10, **options})


def test_a_loss_that_is_not_finite_stops_the_run() -> None:
    x, y = blobs()
    model = mlp()
    with torch.no_grad():
        model[-1].bias.fill_(torch.inf)
    with pytest.raises(FloatingPointError, match="lower the learning rate"):
        LOCO(model, lr=1e-3, steps=10).step(x, y)


def test_calibration_needs_biases_and_inputs_that_differ() -> None:
    with pytest.raises(ValueError, match="has no bias"):
        calibrate_(nn.Sequential(nn.Linear(2, 2, bias=False)), torch.rand(4, 2))
    with pytest.raises(ValueError, match="must differ"):
        calibrate_(mlp(), torch.ones(4, 6))
