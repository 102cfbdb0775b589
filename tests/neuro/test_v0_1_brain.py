"""Brain-age models, taught sites and states of training that version 0.1 wrote."""

from __future__ import annotations

import dataclasses

import numpy as np
import pytest
import torch
from brain_cases import made_up

from enn_core.files.migrations import Content
from neuro import train
from neuro.age import calibrate, model
from neuro.age.calibrate import BiasCorrection, Calibration, CalibrationError, Conformal
from neuro.age.model import BrainAgeModel, ModelError, last_inputs
from neuro.age.predict import BrainAge, Seen
from neuro.teach import Site, list_sites
from neuro.train import TrainConfig, TrainError, make_inputs, train_network

# As `fixtures/write_v0_1.py` has it.
BRAIN = {
    "options": {"widths": [4, 4, 4, 4], "strides": [2, 1, 1, 1], "grid": [2, 2, 2]},
    "epochs": 3,
    "batch_size": 4,
    "views": 2,
}


def seen(brain: BrainAge, volume: np.ndarray, number: int) -> Seen:
    said = brain.model.predict(volume[None])
    inputs = last_inputs(brain.model, volume)
    return Seen(f"scan-{number}", float(said.ages[0]), said.by_head[0], inputs, [], 0.5)


def test_models_predict_as_they_did(v0_1, expected):
    want, volumes = expected["brain"], made_up(12).volumes[:3]
    brain = BrainAge.load(v0_1 / "brain.safetensors")
    np.testing.assert_allclose(brain.model.predict(volumes).ages, want["ages"], atol=1e-3)
    assert brain.sha256 == want["weights"]
    assert brain.trained_ages == (20.0, 82.0)
    assert brain.model.conformal == Conformal((-3.0, -1.0, 0.5, 2.0, 4.0))
    assert brain.model.bias == BiasCorrection("cole", 0.8, 10.0, 12)
    assert (brain.reference.count, brain.model.population.count) == (20, 12)
    bare = BrainAgeModel.load(v0_1 / "brain-bare.safetensors")
    assert (bare.reference, bare.population, bare.bias) == (None, None, None)
    np.testing.assert_allclose(bare.predict(volumes).ages, want["bare"], atol=1e-3)


def test_a_calibration_is_read(v0_1):
    found = Calibration.load(v0_1 / "calibration.json")
    assert found == Calibration({"a": BiasCorrection("offset", 1.0, -2.5, 3)}, "ab" * 32)


def test_a_site_corrects_as_it_did(v0_1, expected, tmp_path):
    want, volumes = expected["brain"], made_up(12).volumes
    brain = BrainAge.load(v0_1 / "brain.safetensors")
    assert list_sites(brain) == ["site"]
    scans = [seen(brain, volumes[i], i) for i in range(4)]
    with Site.open(brain, "site") as site, Site.open(brain, "other") as other:
        assert [[h.entry, h.name, h.age, h.active] for h in site.history()] == want["history"]
        np.testing.assert_allclose(site.corrections(scans), want["corrections"], atol=1e-2)
        assert other.import_(v0_1 / "site-lessons.json") == 3
        assert other.corrections(scans).tobytes() == site.corrections(scans).tobytes()
        assert site.teach(scans[3], 52.0, force=True).entry == 4


def test_what_is_read_whole_is_brought_up_to_date(v0_1, expected, monkeypatch, tmp_path):
    file, other = v0_1 / "brain.safetensors", tmp_path / "new.safetensors"
    bytes_before = file.read_bytes()
    with monkeypatch.context() as later:
        later.setattr(model, "FORMAT", Content(lambda content: {**content, "about": {"new": 1}}))
        brain = BrainAge.load(file)
        assert (brain.model.about, brain.sha256) == ({"new": 1}, expected["brain"]["weights"])
        brain.model.save(other)
        BrainAgeModel.load(other)
    assert file.read_bytes() == bytes_before
    with pytest.raises(
        ModelError, match=r"^[^\n]*: the model has format 2, this version reads 1; u"
    ):
        BrainAge.load(other)
    with monkeypatch.context() as later:
        later.setattr(calibrate, "FORMAT", Content(lambda content: {**content, "weights": ""}))
        Calibration.load(v0_1 / "calibration.json").save(tmp_path / "new.json")
    with pytest.raises(CalibrationError, match=r"^[^\n]*: the calibration has format 2, this ver"):
        Calibration.load(tmp_path / "new.json")


def test_a_newer_state_is_refused(v0_1, monkeypatch):
    data, config = made_up(8), dataclasses.replace(TrainConfig(), **BRAIN)
    state, found = v0_1 / "checkpoints" / "brain.pt", []
    with monkeypatch.context() as later:
        later.setattr(train, "FORMAT", Content(lambda s: found.append(s["epoch"]) or s))
        train_network(config, make_inputs(data, config), data.ages, state=state)
    assert found == [2]
    with pytest.raises(TrainError, match=r"^[^\n]* has format 2, this version reads 1; update the"):
        train_network(config, make_inputs(data, config), data.ages, state=state)


def test_a_run_goes_on(v0_1, expected, one_thread):
    data = made_up(8)
    config = dataclasses.replace(TrainConfig(), **BRAIN)
    state = v0_1 / "checkpoints" / "brain.pt"
    done = torch.load(state, weights_only=True)["epoch"]
    lines: list[str] = []
    _, _, losses = train_network(
        config, make_inputs(data, config), data.ages, state=state, report=lines.append
    )
    assert (done, len(lines)) == (2, 1)
    want = torch.tensor(expected["checkpoints"]["brain"], dtype=losses.dtype)
    torch.testing.assert_close(losses, want, rtol=0.02, atol=1e-3)
