"""Image-text search over eigen-coordinates.

>>> import retrieval                                                  # doctest: +SKIP
>>> index = retrieval.open_index("Photos")                            # doctest: +SKIP
>>> for hit in index.search("a dog in the snow", k=5):                # doctest: +SKIP
...     print(hit.id, round(hit.score, 3), hit.path)
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from retrieval.datasets import DatasetError, load_karpathy
    from retrieval.eigen import EigenBasis
    from retrieval.images import ImageError
    from retrieval.index import EigenIndex, default_index_dir
    from retrieval.lessons import Effect, HistoryEntry, Lesson
    from retrieval.marks import TeachError
    from retrieval.models import ModelError, RetrievalModel, list_models, load
    from retrieval.profiles import ProfileError, list_profiles
    from retrieval.protocols import open_dataset
    from retrieval.search import (
        Hit,
        QueryError,
        Searcher,
        open_index,
        parse_query,
        rank_captions,
    )
    from retrieval.teaching import Teacher

# Imported on first use: torch, faiss and the models take seconds.
_HOME = {
    "DatasetError": "retrieval.datasets",
    "Effect": "retrieval.lessons",
    "EigenBasis": "retrieval.eigen",
    "EigenIndex": "retrieval.index",
    "HistoryEntry": "retrieval.lessons",
    "Hit": "retrieval.search",
    "ImageError": "retrieval.images",
    "Lesson": "retrieval.lessons",
    "ModelError": "retrieval.models",
    "ProfileError": "retrieval.profiles",
    "QueryError": "retrieval.search",
    "RetrievalModel": "retrieval.models",
    "Searcher": "retrieval.search",
    "TeachError": "retrieval.marks",
    "Teacher": "retrieval.teaching",
    "default_index_dir": "retrieval.index",
    "list_models": "retrieval.models",
    "list_profiles": "retrieval.profiles",
    "load": "retrieval.models",
    "load_karpathy": "retrieval.datasets",
    "open_dataset": "retrieval.protocols",
    "open_index": "retrieval.search",
    "parse_query": "retrieval.search",
    "rank_captions": "retrieval.search",
}

__all__ = [
    "DatasetError",
    "Effect",
    "EigenBasis",
    "EigenIndex",
    "HistoryEntry",
    "Hit",
    "ImageError",
    "Lesson",
    "ModelError",
    "ProfileError",
    "QueryError",
    "RetrievalModel",
    "Searcher",
    "TeachError",
    "Teacher",
    "default_index_dir",
    "list_models",
    "list_profiles",
    "load",
    "load_karpathy",
    "open_dataset",
    "open_index",
    "parse_query",
    "rank_captions",
]


def __getattr__(name: str) -> Any:
    if name not in _HOME:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    value = getattr(import_module(_HOME[name]), name)
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return sorted([*globals(), *__all__])
