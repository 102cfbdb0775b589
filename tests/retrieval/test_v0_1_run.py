"""A checkpoint of a contrastive run that version 0.1 wrote: it goes on, and ends as it did then."""

from __future__ import annotations

import gzip

import pytest
import torch
from training_cases import TINY, write_photos

from enn_core.files.migrations import Content
from retrieval.training import run
from retrieval.training.config import TrainConfig, TrainError
from retrieval.training.run import train

# As `fixtures/write_v0_1.py` has it.
TOWER = {
    **TINY,
    "vision": {"image_size": 16, "patch_size": 8, "width": 8, "layers": 2, "head_width": 8},
    "blocks": 2,
    "rule": "local",
    "dataset": "squares",
    "amp": False,
}


def test_a_run_goes_on(v0_1, expected, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    for name in ("squares", "tower"):
        (tmp_path / name).mkdir()
    write_photos(tmp_path / "squares", 16)
    packed = (v0_1 / "checkpoints" / "tower.pt.gz").read_bytes()
    (tmp_path / "tower" / "checkpoint.pt").write_bytes(gzip.decompress(packed))
    result = train(TrainConfig(**TOWER), output=tmp_path / "tower")
    assert (result["epochs"], result["steps"]) == (2, 4)
    assert result["loss"] == pytest.approx(expected["checkpoints"]["tower"], rel=1e-2)
    assert len((tmp_path / "tower" / "log.csv").read_text().splitlines()) == 3

    checkpoint, found = tmp_path / "tower" / "checkpoint.pt", []
    with monkeypatch.context() as later:
        later.setattr(run, "FORMAT", Content(lambda state: found.append(state["step"]) or state))
        train(TrainConfig(**TOWER), output=tmp_path / "tower")
    assert found == [4]
    torch.save({**torch.load(checkpoint, weights_only=True), "format": 2}, checkpoint)
    with pytest.raises(TrainError, match=r"^[^\n]* has format 2, this version reads 1; update"):
        train(TrainConfig(**TOWER), output=tmp_path / "tower")
