"""Node perturbation against backpropagation, which it must equal in the mean."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from enn_core.loco import Perturbation, perturb, to_stages
from enn_core.loco.node_perturbation import LOSSES
from enn_core.spiking import IF, ClampedReLU, Decode, Encode

NETWORKS = {
    "linear": lambda: nn.Sequential(
        nn.Flatten(), nn.Linear(16, 6), nn.Tanh(), nn.Linear(6, 5), nn.Tanh(), nn.Linear(5, 3)
    ),
    "no bias": lambda: nn.Sequential(nn.Flatten(), nn.Linear(16, 3, bias=False), nn.Sigmoid()),
    "convolutions": lambda: nn.Sequential(
        nn.Conv2d(1, 3, 3, padding=1),
        nn.Tanh(),
        nn.AvgPool2d(2),
        nn.Sequential(nn.Conv2d(3, 4, 2), nn.Tanh()),
        nn.Flatten(),
        nn.Linear(4, 3),
    ),
    "tokens": lambda: nn.Sequential(
        nn.Flatten(1, 2), nn.Linear(4, 5), nn.Tanh(), nn.Linear(5, 2), nn.Flatten(), nn.Linear(8, 3)
    ),
    "strides": lambda: nn.Sequential(
        nn.Conv2d(1, 2, (3, 2), stride=(1, 2), padding=(1, 0), dilation=(1, 2)),
        nn.Tanh(),
        nn.Flatten(),
        nn.LazyLinear(3),
    ),
}


def batch() -> tuple[Tensor, Tensor]:
    return torch.rand(5, 1, 4, 4, dtype=torch.float64), torch.tensor([0, 1, 2, 0, 1])


def backprop(model: nn.Module, x: Tensor, y: Tensor, loss: str) -> list[Tensor]:
    """Gradients (out, columns), bias last: the oracle."""
    model.zero_grad()
    LOSSES[loss](model(x), y).mean().backward()
    gradients = []
    for stage in to_stages(model)[1]:
        parts = [stage.layer.weight.grad.flatten(1)]
        if stage.layer.bias is not None:
            parts.append(stage.layer.bias.grad[:, None])
        gradients.append(torch.cat(parts, 1))
    return gradients


def estimate(
    model: nn.Module, x: Tensor, y: Tensor, loss: str, how: Perturbation, time: int = 1
) -> list[Tensor]:
    with torch.inference_mode():
        estimates, _ = perturb(*to_stages(model), x, y, LOSSES[loss], how, time)
        return [one.gradient() for one in estimates]


@pytest.mark.parametrize("loss", LOSSES)
@pytest.mark.parametrize("name", NETWORKS)
def test_mean_is_the_gradient(name: str, loss: str) -> None:
    torch.manual_seed(0)
    model = NETWORKS[name]().double()
    x, y = batch()
    model(x)
    wanted = backprop(model, x, y, loss)
    errors = []
    for probes in (64, 4096):
        got = estimate(model, x, y, loss, Perturbation(1e-3, probes, antithetic=True))
        gap = sum(float((a - b).square().sum()) for a, b in zip(got, wanted, strict=True))
        errors.append((gap / sum(float(g.square().sum()) for g in wanted)) ** 0.5)
    assert errors[1] < errors[0] / 4  # 1 / 8 is expected: the error falls as 1 / sqrt(probes)
    assert errors[1] < 0.5


def test_error_falls_with_the_root_of_the_probes() -> None:
    torch.manual_seed(1)
    model = NETWORKS["linear"]().double()
    x, y = batch()
    wanted = backprop(model, x, y, "mse")[0]
    errors = {}
    for probes in (10, 1000):
        how = Perturbation(1e-3, probes)
        runs = [estimate(model, x, y, "mse", how)[0] - wanted for _ in range(20)]
        errors[probes] = float(torch.stack(runs).square().sum((1, 2)).mean().sqrt())
    assert errors[10] / errors[1000] == pytest.approx(10, rel=0.35)


def test_antithetic_pairs_remove_what_is_even_in_the_noise() -> None:
    """A linear map at its optimum: the loss only rises, and pairs see no slope at all."""
    model = nn.Sequential(nn.Linear(3, 2)).double()
    x, y = torch.rand(4, 3).double(), torch.tensor([0, 1, 0, 1])
    with torch.no_grad():
        model[0].weight.zero_()
        model[0].bias.copy_(torch.tensor([1.0, 0.0]))
    x, y = x[:2], torch.tensor([0, 0])
    pairs = estimate(model, x, y, "mse", Perturbation(0.5, 8, antithetic=True))
    single = estimate(model, x, y, "mse", Perturbation(0.5, 8))
    assert float(pairs[0].norm()) < 1e-12 < float(single[0].norm())


def test_clamped_units_get_no_error() -> None:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(2, 3), ClampedReLU(), nn.Linear(3, 2))
    with torch.no_grad():
        model[0].weight.zero_()
        model[0].bias.copy_(torch.tensor([-1.0, 0.5, 2.0]))
    got = estimate(model, torch.rand(4, 2), torch.tensor([0, 1, 1, 0]), "mse", Perturbation())
    assert (got[0].abs().sum(1) > 0).tolist() == [False, True, False]


@pytest.mark.parametrize("antithetic", [False, True])
def test_losses_are_those_without_noise(antithetic: bool) -> None:
    torch.manual_seed(0)
    model = NETWORKS["convolutions"]().double()
    x, y = batch()
    with torch.inference_mode():
        how = Perturbation(0.3, 3, antithetic)
        estimates, losses = perturb(*to_stages(model), x, y, LOSSES["ce"], how)
        torch.testing.assert_close(losses, F.cross_entropy(model(x), y, reduction="none"))
    torch.testing.assert_close(estimates[0].rows.shape, torch.Size([5, 16, 10]))


def test_spiking_forward_is_what_is_perturbed() -> None:
    """Rates of spikes move in steps; with noise of a step's size the slope is the rate curve's."""
    torch.manual_seed(0)
    steps = 8
    spiking = nn.Sequential(Encode(steps), nn.Linear(6, 4), IF(steps), nn.Linear(4, 3))
    spiking.append(Decode(steps))
    rate = nn.Sequential(spiking[1], ClampedReLU(), spiking[3])
    with torch.no_grad():
        spiking[1].bias.fill_(0.5)
        spiking[1].weight.mul_(0.3)
    x, y = torch.rand(5, 6), torch.tensor([0, 1, 2, 0, 1])
    how = Perturbation(0.15, 4000, antithetic=True)
    got = estimate(spiking, x, y, "mse", how, steps)
    for mine, wanted in zip(got, backprop(rate, x, y, "mse"), strict=True):
        cosine = F.cosine_similarity(mine.flatten(), wanted.flatten(), dim=0)
        assert cosine > 0.9
        assert float(mine.norm()) == pytest.approx(float(wanted.norm()), rel=0.3)


@pytest.mark.parametrize(("options", "word"), [({"sigma": 0}, "sigma"), ({"probes": 0}, "probes")])
def test_bad_settings(options: dict[str, int], word: str) -> None:
    with pytest.raises(ValueError, match=word):
        Perturbation(**options)
