"""A small folder of pictures and its index."""

from __future__ import annotations

from pathlib import Path

import pytest
from index_cases import TinyTestModel, age, photo

from retrieval.index.eigen_index import EigenIndex, default_index_dir


@pytest.fixture
def model() -> TinyTestModel:
    return TinyTestModel()


@pytest.fixture
def root(tmp_path: Path) -> Path:
    folder = tmp_path / "meine Fotos é 日本"
    for number in range(8):
        photo(folder / f"{number}.png", number)
    photo(folder / "Ordner mit Leerzeichen" / "x.png", 100)
    age(folder)
    return folder


@pytest.fixture
def index(root: Path, model: TinyTestModel) -> EigenIndex:
    index = EigenIndex.create(default_index_dir(root), model)
    index.update(root, model)
    return index
