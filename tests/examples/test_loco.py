"""The examples of LOCO run as they are, only shorter."""

from __future__ import annotations

import importlib.util
from collections.abc import Callable
from typing import Any

import pytest
from places import ROOT

EXAMPLES = ROOT / "examples"


def main_of(name: str) -> Callable[[list[str]], Any]:
    spec = importlib.util.spec_from_file_location(f"example_{name}", EXAMPLES / f"{name}.py")
    module = importlib.util.module_from_spec(spec)  # type: ignore[arg-type]
    spec.loader.exec_module(module)  # type: ignore[union-attr]
    return module.main


def test_spiking_network(capsys: pytest.CaptureFixture[str]) -> None:
    accuracy = main_of("loco_spiking")(["--steps", "120"])
    assert accuracy > 0.25  # ten layers of spikes have begun to tell digits apart
    assert "step 100: loss" in capsys.readouterr().out


def test_continual_learning(capsys: pytest.CaptureFixture[str]) -> None:
    held, lost = (main_of("continual")(["--steps", "200", "--alpha", a]) for a in ("1e-2", "0"))
    assert held["kept"] > 0.9 > 0.5 > lost["kept"]
    assert held["learnt"] > 0.7
    assert "are taken" in capsys.readouterr().out
