"""Brain-age models, taught sites and states of training that version 0.1 wrote."""

from __future__ import annotations

import dataclasses

import numpy as np
import torch
from brain_cases import made_up

from neuro.calibrate import BiasCorrection, Calibration, Conformal
from neuro.model import BrainAgeModel, last_inputs
from neuro.predict import BrainAge, Seen
from neuro.teaching import Site, list_sites
from neuro.train import TrainConfig, make_inputs, train_network

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
