"""Every column that the brain commands write is told on its page."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

pytest.importorskip("typer")

from apps.cli.brain.predict import _COLUMNS
from neuro.metrics import by_decade, evaluate

PAGE = (Path(__file__).parents[2] / "docs" / "brain-tables.md").read_text("utf-8")


@pytest.mark.parametrize(
    ("heading", "columns"),
    [
        ("predict", _COLUMNS),
        ("evaluate", (*evaluate([50, 60], [51, 63]), *by_decade([50.0], [51.0])[0], "variant")),
        ("explain", ("file", "predicted_age", "flags", "map", "largest", "error")),
    ],
)
def test_every_column_is_told(heading, columns):
    (part,) = re.findall(rf"^## `enn brain {heading} .*?(?=^## |\Z)", PAGE, re.M | re.S)
    assert set(columns) <= set(re.findall(r"`([a-z0-9_]+)`", part))
