"""An indexed folder of photos of animals, to be taught; test files ask for `here` to be in it."""

from __future__ import annotations

import shutil
from pathlib import Path

import pytest
from animal_photos import BAD, GOOD, OTHERS
from cli_cases import GALLERY, document, load_models_once, run


@pytest.fixture(scope="module")
def models_loaded_once():
    with pytest.MonkeyPatch.context() as patch:
        load_models_once(patch)
        yield


@pytest.fixture(scope="module")
def photos(tmp_path_factory, models_loaded_once) -> Path:
    folder = tmp_path_factory.mktemp("teach") / "Fotos – Ünï 日本"
    folder.mkdir()
    for name in (*GOOD, *BAD, *OTHERS):
        shutil.copy(GALLERY / f"{name}.webp", folder)
    assert run("index", folder).code == 0
    return folder


@pytest.fixture(scope="module")
def ids(photos) -> dict[str, int]:
    """Ids by file name without ending."""
    found = document("query", "anything", "--index", photos, "-k", "99")["results"]
    return {Path(hit["path"]).stem: hit["id"] for hit in found}


@pytest.fixture
def profiles(tmp_path, monkeypatch) -> Path:
    monkeypatch.setenv("ENN_PROFILES", str(tmp_path / "profiles"))
    return tmp_path / "profiles"


@pytest.fixture
def here(photos, profiles, monkeypatch) -> Path:
    """Everything is found from the current folder."""
    monkeypatch.chdir(photos)
    return photos


@pytest.fixture
def good(ids) -> str:
    return ",".join(str(ids[name]) for name in GOOD)


@pytest.fixture
def bad(ids) -> str:
    return ",".join(str(ids[name]) for name in BAD)


@pytest.fixture
def no_guard(monkeypatch) -> None:
    """Of a dozen pictures any lesson may move a large share."""
    monkeypatch.setattr("retrieval.teach.guard.LEAST_OVERLAP", 0.0)
    monkeypatch.setattr("retrieval.teach.guard.MOST_AGREEMENT_LOST", 1.0)


@pytest.fixture
def strict_guard(monkeypatch) -> None:
    monkeypatch.setattr("retrieval.teach.guard.LEAST_OVERLAP", 1.1)
