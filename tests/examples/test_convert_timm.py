"""examples/convert_timm.py runs as it is."""

from __future__ import annotations

import os
import subprocess
import sys

import pytest
import timm
from places import ROOT
from safetensors.torch import load_file


@pytest.mark.slow
@pytest.mark.parametrize("model", ["test_vit", "test_resnet"])
def test_a_timm_model_is_trained_on_two_processes_and_fused(tmp_path, model):
    done = subprocess.run(
        [
            *(sys.executable, ROOT / "examples" / "convert_timm.py", "--model", model),
            *("--epochs", "1", "--batch", "64", "--output", tmp_path / "m.safetensors"),
        ],
        capture_output=True, text=True, timeout=900,
        env={**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT)},
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    assert "% of test right, by timm's own model" in done.stdout
    plain = timm.create_model(model, num_classes=10, in_chans=1)
    assert sorted(load_file(tmp_path / "m.safetensors")) == sorted(plain.state_dict())
