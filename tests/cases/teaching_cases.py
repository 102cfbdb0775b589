"""What the tests of teaching share; their fixtures are in `conftest.py`."""

from __future__ import annotations

from pathlib import Path

import numpy as np
from index_cases import TinyTestModel, photo

from retrieval.index.eigen_index import EigenIndex
from retrieval.search import Searcher
from retrieval.teach.teacher import Teacher

PICTURES = 60
QUERY = "a red thing"


def make_gallery(root: Path, count: int = PICTURES, first: int = 0) -> Path:
    """A folder of `count` pictures with its index inside."""
    for seed in range(first, first + count):
        photo(root / f"{seed}.png", seed)
    model = TinyTestModel()
    with EigenIndex.create(root / ".enn-index", model, root=root) as index:
        index.update(root, model)
    return root


def open_profile(root: Path, name: str = "me", path: Path | None = None) -> Searcher:
    model = TinyTestModel()
    index = EigenIndex.open(root, model=model)
    return Searcher(index, model, Teacher.open(model, name, path=path))


def ranked(searcher: Searcher, query: str = QUERY, taught: bool = True) -> list[int]:
    return [hit.id for hit in searcher.search(query, k=len(searcher.index), taught=taught)]


def bits(teacher: Teacher) -> bytes:
    """What a teacher does to some directions, bit by bit."""
    rows = np.random.default_rng(5).normal(size=(7, 16))
    delta = teacher.delta
    return teacher.map(rows).tobytes() + (b"" if delta is None else delta.tobytes())
