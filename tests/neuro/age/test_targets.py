"""Age as a number and as a distribution."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from neuro.age.targets import AgeBins, AgeValue, make_target, target_settings


@given(age=st.floats(20, 85))
def test_soft_labels_are_distributions_around_the_age(age):
    bins = AgeBins()
    label = bins.soft_labels(torch.tensor([age]))
    assert label.shape == (1, bins.outputs)
    assert label.sum() == pytest.approx(1, abs=1e-5)
    assert (label >= 0).all()
    expected = float(label[0] @ bins.centres())
    assert expected == pytest.approx(age, abs=1.5)  # cut off at the ends


def test_peng_s_bins():
    bins = AgeBins(low=42, high=82, step=1, sigma=1)
    assert bins.outputs == 40
    assert bins.centres()[[0, -1]].tolist() == [42.5, 81.5]
    beyond = bins.soft_labels(torch.tensor([120.0]))
    assert beyond[0, -1] == pytest.approx(1)


@pytest.mark.parametrize("target", [AgeValue(50.0, 15.0), AgeValue(50.0, 15.0, 1), AgeBins()])
def test_losses_lead_to_the_age(target):
    ages = torch.tensor([25.0, 40, 62, 75])
    prediction = torch.zeros(4, target.outputs, requires_grad=True)
    optimizer = torch.optim.Adam([prediction], lr=0.1)
    first = float(target.loss(prediction.detach(), ages))
    for _ in range(120):
        loss = target.loss(prediction, ages)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    assert float(loss.detach()) < first
    assert (target.ages(prediction) - ages).abs().max() < 1.5


def test_a_new_head_says_the_mean_age():
    assert AgeValue(47.0, 16.0).ages(torch.zeros(2, 1)).tolist() == [47.0, 47.0]


def test_no_age_is_negative():
    assert AgeValue(47.0, 16.0).ages(torch.full((1, 1), -9.0)).tolist() == [0.0]


@pytest.mark.parametrize("target", [AgeValue(47.3, 16.1, 1), AgeBins(20, 80, 2, 3, 0.1)])
def test_settings_make_the_target_again(target):
    assert make_target(target_settings(target)) == target


def test_errors():
    with pytest.raises(ValueError, match="low must be below high"):
        AgeBins(low=80, high=20)
    with pytest.raises(ValueError, match="valid are 'value' and 'bins'"):
        make_target({"kind": "rank"})
