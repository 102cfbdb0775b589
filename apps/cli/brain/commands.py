"""The commands of `enn brain`, in the order in which its help lists them: that of work."""

from __future__ import annotations

from apps.cli.brain import (
    calibrate,
    evaluate,
    explain,
    export_bundle,
    predict,
    preprocess,
    teach,
    train,
)
from apps.cli.brain.group import brain_app

__all__ = ["brain_app"]

for _module in (predict, preprocess, explain, teach, calibrate, evaluate, train, export_bundle):
    brain_app.add_typer(_module.app)
