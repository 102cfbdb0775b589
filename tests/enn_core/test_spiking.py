"""Spiking neurons against a slow count of spikes, and what the modules promise of time."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

from enn_core.loco import LOCO, calibrate_
from enn_core.spiking import IF, LIF, ClampedReLU, Decode, Encode, spiking_twin


@settings(max_examples=40, deadline=None)
@given(
    steps=st.integers(1, 12),
    units=st.integers(1, 5),
    leak=st.sampled_from([1.0, 0.9, 0.5]),
    seed=st.integers(0, 999),
)
def test_neurons_against_a_slow_count(steps: int, units: int, leak: float, seed: int) -> None:
    rng = np.random.default_rng(seed)
    currents = rng.normal(0.4, 0.8, (steps, 2, units)).astype(np.float32)
    spikes = LIF(steps, leak)(torch.from_numpy(currents).flatten(0, 1)).numpy()
    spikes = spikes.reshape(steps, 2, units)
    for sample in range(2):
        for unit in range(units):
            v = 0.5
            for now in range(steps):
                v = leak * v + float(currents[now, sample, unit])
                if abs(v - 1.0) < 1e-5:
                    break  # float32 and float64 may differ in which side of the threshold
                assert spikes[now, sample, unit] == (v >= 1.0)
                v -= v >= 1.0


@pytest.mark.parametrize("steps", [1, 7, 32])
def test_rate_of_if_is_the_clamped_current(steps: int) -> None:
    z = torch.linspace(-0.5, 1.5, 41)
    rates = Decode(steps)(IF(steps)(Encode(steps)(z[:, None]))).flatten()
    assert float((rates - ClampedReLU()(z)).abs().max()) <= 0.5 / steps + 1e-6


def test_leak_silences_weak_currents() -> None:
    z = torch.tensor([[0.05], [0.5], [1.2]])
    rates = Decode(200)(LIF(200, leak=0.9)(Encode(200)(z))).flatten()
    assert rates[0] == 0
    assert 0.3 < rates[1] < 0.5
    assert rates[2] == 1


def test_poisson_coding_has_the_inputs_as_means() -> None:
    torch.manual_seed(0)
    x = torch.tensor([[0.0, 0.2, 0.9, 1.0]])
    spikes = Encode(4000, "poisson")(x)
    assert set(spikes.unique().tolist()) == {0.0, 1.0}
    torch.testing.assert_close(Decode(4000)(spikes), x, atol=0.03, rtol=0)


@pytest.mark.parametrize("conv", [False, True])
def test_twin_shares_weights_and_approaches_its_rates(conv: bool) -> None:
    torch.manual_seed(0)
    body: list[nn.Module] = (
        [nn.Conv2d(1, 3, 3, padding=1), ClampedReLU(), nn.AvgPool2d(2), nn.Flatten()]
        if conv
        else [nn.Flatten(), nn.Linear(16, 12), ClampedReLU()]
    )
    rate = nn.Sequential(*body, nn.Linear(12, 3))
    x = torch.rand(5, 1, 4, 4)
    calibrate_(rate, x)
    with torch.no_grad():
        gaps = [float((spiking_twin(rate, steps)(x) - rate(x)).abs().max()) for steps in (8, 256)]
    assert gaps[1] < 0.02 < gaps[0] * 4
    twin = spiking_twin(rate, 4, leak=0.8)
    assert {id(p) for p in twin.parameters()} == {id(p) for p in rate.parameters()}


def test_twin_finds_neurons_that_are_nested_or_used_twice() -> None:
    neuron = ClampedReLU()
    rate = nn.Sequential(nn.Sequential(nn.Linear(3, 3), neuron), nn.Linear(3, 3), neuron)
    twin = spiking_twin(rate, 5)
    assert sum(isinstance(module, LIF) for module in twin.modules()) == 2
    assert not any(isinstance(module, ClampedReLU) for module in twin.modules())


@pytest.mark.parametrize("leak", [1.0, 0.8])
@pytest.mark.parametrize("conv", [False, True])
def test_spiking_network_of_eleven_layers_learns_through_its_spikes(
    conv: bool, leak: float
) -> None:
    """Two bright halves: no rate network, no surrogate gradient, no autograd."""
    torch.manual_seed(0)
    steps, before = 6, 1 if conv else 64
    layers: list[nn.Module] = []
    if conv:
        for _ in range(7):  # 8 x 8 pixels to one
            layers += [nn.Conv2d(before, 4, 2), ClampedReLU()]
            before = 4
    layers.append(nn.Flatten())
    for _ in range(3 if conv else 10):
        layers += [nn.Linear(before, 16), ClampedReLU()]
        before = 16
    model = spiking_twin(nn.Sequential(*layers, nn.Linear(16, 2)), steps, leak=leak)
    assert sum(isinstance(layer, (nn.Conv2d, nn.Linear)) for layer in model) == 11
    y = torch.arange(64) % 2
    x = 0.3 * torch.rand(64, 1, 8, 8)
    x[y == 0, :, :4] += 0.5
    x[y == 1, :, 4:] += 0.5
    calibrate_(model, x)
    rule = LOCO(model, lr=1e-2, steps=60, sigma=0.05, projection="mean", loss="ce")
    with torch.inference_mode():
        losses = [rule.step(x, y) for _ in range(60)]
    assert sum(losses[-5:]) < 0.7 * sum(losses[:5])
    assert float((rule.scores(x).argmax(1) == y).float().mean()) > 0.9


@pytest.mark.parametrize(
    ("make", "word"),
    [
        (lambda: LIF(0), "steps must be at least 1"),
        (lambda: LIF(3, leak=0.0), "leak must be above 0"),
        (lambda: Encode(3, "rate"), "constant or poisson"),  # type: ignore[arg-type]
        (lambda: IF(3)(torch.zeros(4, 2)), "not a multiple of 3 time steps"),
    ],
)
def test_bad_settings(make: object, word: str) -> None:
    with pytest.raises(ValueError, match=word):
        make()  # type: ignore[operator]
