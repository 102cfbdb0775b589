"""Checkpoints of training runs that version 0.1 wrote: they go on, and end as they did then."""

from __future__ import annotations

import json
import shutil

import local_toys
import pytest
import torch

from enn_core.lab.classify.config import ClassifyConfig
from enn_core.lab.classify.run import train

# As `fixtures/write_v0_1.py` has it.
CLASSIFIER = {
    "arch": "mlp-relu:3x8",
    "train": 64,
    "batch_size": 32,
    "epochs": 2,
    "rule": "local",
    "layers": "enn",
    "blocks": 2,
}


def test_a_local_trainer_goes_on(v0_1, expected):
    trainer = local_toys.make(2, seed=5)
    trainer.load(v0_1 / "checkpoints" / "trainer.pt")
    assert trainer.steps == 3
    for step in range(3, 6):
        trainer.step(*local_toys.batch(step))
    want = torch.tensor(expected["checkpoints"]["trainer"], dtype=trainer.losses.dtype)
    torch.testing.assert_close(trainer.losses, want, rtol=1e-3, atol=1e-4)


def test_a_classifier_goes_on(v0_1, expected, tmp_path):
    output = tmp_path / "run"
    output.mkdir()
    shutil.copy(v0_1 / "checkpoints" / "classifier.pt", output / "checkpoint.pt")
    result = train(ClassifyConfig.load("small", CLASSIFIER), output=output)
    assert (result["epochs"], result["steps"]) == (2, 4)
    assert result["loss"] == pytest.approx(expected["checkpoints"]["classifier"], rel=1e-3)
    assert json.loads((output / "result.json").read_text()) == result
    assert len((output / "log.csv").read_text().splitlines()) == 3
