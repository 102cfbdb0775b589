"""Fixtures of the tests of teaching: an indexed gallery of small pictures, a place for profiles."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest
from teaching_cases import make_gallery, open_profile

from retrieval.search import Searcher
from retrieval.teach import fitting


@pytest.fixture(scope="session")
def gallery(tmp_path_factory) -> Path:
    return make_gallery(tmp_path_factory.mktemp("gallery"))


@pytest.fixture
def profiles(tmp_path, monkeypatch) -> Path:
    monkeypatch.setenv("ENN_PROFILES", str(tmp_path / "profiles"))
    # The pictures are noise: held-out marks would often prefer the words, and nothing would move.
    monkeypatch.setattr(fitting, "_MARGIN", -2.0)
    return tmp_path / "profiles"


@pytest.fixture
def searcher(gallery, profiles) -> Iterator[Searcher]:
    with open_profile(gallery) as opened:
        yield opened
