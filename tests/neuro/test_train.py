"""Training by either rule, exact resume, and models on disk."""

from __future__ import annotations

import csv
import dataclasses
import json

import numpy as np
import pytest
import torch
from brain_cases import made_up
from safetensors.torch import save_file

from neuro.age.model import BrainAgeModel, Member, ModelError, by_head
from neuro.age.networks import build
from neuro.age.targets import AgeBins
from neuro.augment import views
from neuro.train import TrainConfig, TrainError, fit, make_inputs, refit_heads_, train_network

TINY = TrainConfig(
    options={"widths": [4, 4, 6, 6], "strides": [2, 1, 1, 1], "grid": [2, 2, 2]},
    epochs=3,
    batch_size=4,
    views=2,
)


@pytest.fixture(scope="module")
def data():
    return made_up(16)


@pytest.fixture(scope="module")
def inputs(data):
    return make_inputs(data, TINY)


@pytest.mark.parametrize("layers", ["enn", "plain"])
@pytest.mark.parametrize("rule", ["local", "backprop"])
def test_every_rule_learns(data, inputs, rule, layers):
    config = dataclasses.replace(TINY, rule=rule, layers=layers, epochs=8, lr=1e-2)
    net, target, losses = train_network(config, inputs, data.ages)
    assert losses.shape == (8 * 4, 4 if rule == "local" else 1)
    assert losses[-4:].mean() < 0.6 * losses[:4].mean()
    said = by_head(net, target, inputs[:, 0])
    assert said.shape == (16, 4)
    if rule == "local":
        errors = np.abs(said.mean(1) - data.ages).mean()
    else:
        errors = np.abs(said[:, -1] - data.ages).mean()
        assert np.ptp(said[:, 0]) == 0  # no head but the last learns
    assert errors < 0.6 * np.abs(data.ages - data.ages.mean()).mean()


def test_rules_begin_alike(data, inputs):
    first = [
        train_network(dataclasses.replace(TINY, rule=rule, epochs=1), inputs, data.ages)[2][0, -1]
        for rule in ("local", "backprop")
    ]
    assert first[0] == first[1]


@pytest.mark.parametrize("target", ["absolute", "bins"])
def test_other_targets_learn(data, inputs, target):
    config = dataclasses.replace(TINY, target=target, epochs=6, lr=1e-2)
    net, made, losses = train_network(config, inputs, data.ages)
    assert losses[-4:].mean() < losses[:4].mean()
    assert by_head(net, made, inputs[:2, 0]).shape == (2, 4)


class Stopped(Exception):
    pass


@pytest.mark.parametrize("rule", ["local", "backprop"])
def test_a_run_that_was_cut_off_continues_to_the_same_bits(data, inputs, tmp_path, rule):
    config = dataclasses.replace(TINY, rule=rule, options={**TINY.options, "dropout": 0.2})
    whole, _, losses = train_network(config, inputs, data.ages)
    state = tmp_path / "state.pt"

    def stop(line: str) -> None:
        if line.startswith("epoch 2"):
            raise Stopped

    with pytest.raises(Stopped):
        train_network(config, inputs, data.ages, state=state, report=stop)
    again, _, continued = train_network(config, inputs, data.ages, state=state)
    assert torch.equal(continued, losses)
    for name, value in whole.state_dict().items():
        assert torch.equal(again.state_dict()[name], value), name
    finished, _, _ = train_network(config, inputs, data.ages, state=state)
    assert torch.equal(finished.blocks[3].block.conv.Q, whole.blocks[3].block.conv.Q)


def test_a_state_of_another_run_is_refused(data, inputs, tmp_path):
    state = tmp_path / "state.pt"
    train_network(TINY, inputs, data.ages, state=state)
    with pytest.raises(TrainError, match="another configuration"):
        train_network(dataclasses.replace(TINY, lr=1e-4), inputs, data.ages, state=state)
    with pytest.raises(TrainError, match="other subjects"):
        train_network(TINY, inputs[1:], data.ages[1:], state=state)
    state.write_bytes(b"half a file")
    with pytest.raises(TrainError, match="delete it"):
        train_network(TINY, inputs, data.ages, state=state)


def test_refitted_heads_are_closer(data, inputs):
    net, target, _ = train_network(TINY, inputs, data.ages)
    before = np.abs(by_head(net, target, inputs[:, 0]).mean(1) - data.ages).mean()
    refit_heads_(net, target, inputs[:, 0], data.ages)
    assert np.abs(by_head(net, target, inputs[:, 0]).mean(1) - data.ages).mean() < before
    with pytest.raises(TrainError, match="bins cannot be refitted"):
        refit_heads_(net, AgeBins(), inputs[:, 0], data.ages)


def test_a_model_is_trained_written_and_read(data, tmp_path):
    lines: list[str] = []
    model, about = fit(data, TINY, tmp_path, members=3, report=lines.append)
    assert len(model.members) == 3
    assert about["out_of_fold"]["mae"] < 0.7 * np.abs(data.ages - data.ages.mean()).mean()
    assert any(line.startswith("network 3/3, epoch 3/3") for line in lines)
    assert json.loads((tmp_path / "report.json").read_text()) == about
    with (tmp_path / "curves.csv").open() as file:
        rows = list(csv.DictReader(file))
    assert list(rows[0]) == ["network", "step", "block_1", "block_2", "block_3", "block_4"]
    assert not list(tmp_path.glob("*.pt"))
    again = BrainAgeModel.load(tmp_path / "model.safetensors")
    mine, theirs = model.predict(data.volumes[:5]), again.predict(data.volumes[:5])
    assert np.allclose(mine.ages, theirs.ages, atol=1e-3)
    assert theirs.by_head.shape == (5, 3, 4)
    assert again.bias == model.bias
    assert again.about["subjects"] == 16
    assert again.conformal is not None
    intervals = again.conformal.interval(theirs.ages, confidence=0.8)
    assert (intervals[:, 0] < theirs.ages).all()


def test_a_brain_and_its_mirror_image_are_of_one_age(data, inputs):
    net, target, _ = train_network(TINY, inputs, data.ages)
    model = BrainAgeModel([Member(net, target)])
    ages = [model.predict(v).ages for v in (data.volumes[:3], data.volumes[:3, ::-1])]
    assert np.allclose(ages[0], ages[1], atol=1e-3)
    assert not np.allclose(
        *(model.predict(v, mirror=False).ages for v in (data.volumes, data.volumes[:, ::-1]))
    )


def test_bad_model_files(tmp_path, data, inputs):
    with pytest.raises(FileNotFoundError, match="no model at"):
        BrainAgeModel.load(tmp_path / "a.safetensors")
    (tmp_path / "a.safetensors").write_bytes(b"nothing")
    with pytest.raises(ModelError, match="no intact safetensors"):
        BrainAgeModel.load(tmp_path / "a.safetensors")
    save_file({"x": torch.zeros(2)}, tmp_path / "b.safetensors")
    with pytest.raises(ModelError, match="got format None"):
        BrainAgeModel.load(tmp_path / "b.safetensors")
    net = build("bins4", layers="plain", **TINY.options)
    net.settings["widths"] = [4, 4, 6, 8]
    BrainAgeModel([Member(net, AgeBins())]).save(tmp_path / "c.safetensors")
    with pytest.raises(ModelError, match="network 1 do not fit") as caught:
        BrainAgeModel.load(tmp_path / "c.safetensors")
    assert "\n" not in str(caught.value)


def test_views_are_the_same_at_every_call(data):
    made = views(data.volumes[0], "sub-00", 3)
    assert made.dtype == np.uint8
    assert np.array_equal(made, views(data.volumes[0], "sub-00", 3))
    assert np.array_equal(made[0], data.volumes[0])
    assert not np.array_equal(made[1], made[2])
    assert not np.array_equal(made[1], views(data.volumes[0], "sub-01", 3)[1])
    assert np.array_equal(made[:2], views(data.volumes[0], "sub-00", 2))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"rule": "loco"}, "valid are local, backprop"),
        ({"target": "rank"}, "valid are value, absolute, bins"),
        ({"precision": "half"}, "valid are bfloat16, float32"),
        ({"epochs": 0}, "give 1 or more"),
    ],
)
def test_bad_configurations(change, message):
    with pytest.raises(TrainError, match=message):
        dataclasses.replace(TINY, **change)


def test_too_few_scans(data, inputs):
    with pytest.raises(TrainError, match="got 3 scans and 3 ages for batches of 4"):
        train_network(TINY, inputs[:3], data.ages[:3])
