"""The pages for contributors name files that there are."""

from __future__ import annotations

import re

import pytest
from places import ROOT


@pytest.mark.parametrize("page", ["docs/architecture.md", "CONTRIBUTING.md", "docs/formats.md"])
def test_files_that_are_named_exist(page):
    text = (ROOT / page).read_text("utf-8")
    named = re.findall(r"`((?:enn_core|retrieval|neuro|apps|tests|benchmarks)/[\w./-]*)`", text)
    assert named
    assert [name for name in named if not (ROOT / name).exists()] == []
