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
    from retrieval.datasets.captioned import DatasetError, load_karpathy
    from retrieval.datasets.protocols import open_dataset
    from retrieval.eigen_coordinates import EigenBasis
    from retrieval.images import ImageError
    from retrieval.index.eigen_index import EigenIndex, default_index_dir
    from retrieval.model.loading import ModelError, list_models, load
    from retrieval.model.retrieval_model import RetrievalModel
    from retrieval.queries import QueryError, parse_query
    from retrieval.search import Hit, Searcher, open_index, rank_captions
    from retrieval.teach.effects import Effect
    from retrieval.teach.marks import TeachError
    from retrieval.teach.profiles import ProfileError, list_profiles
    from retrieval.teach.reports import HistoryEntry, Lesson
    from retrieval.teach.teacher import Teacher

# Imported on first use: torch, faiss and the models take seconds.
_HOME = {
    "DatasetError": "retrieval.datasets.captioned",
    "Effect": "retrieval.teach.effects",
    "EigenBasis": "retrieval.eigen_coordinates",
    "EigenIndex": "retrieval.index.eigen_index",
    "HistoryEntry": "retrieval.teach.reports",
    "Hit": "retrieval.search",
    "ImageError": "retrieval.images",
    "Lesson": "retrieval.teach.reports",
    "ModelError": "retrieval.model.checkpoints",
    "ProfileError": "retrieval.teach.profiles",
    "QueryError": "retrieval.queries",
    "RetrievalModel": "retrieval.model.retrieval_model",
    "Searcher": "retrieval.search",
    "TeachError": "retrieval.teach.marks",
    "Teacher": "retrieval.teach.teacher",
    "default_index_dir": "retrieval.index.eigen_index",
    "list_models": "retrieval.model.loading",
    "list_profiles": "retrieval.teach.profiles",
    "load": "retrieval.model.loading",
    "load_karpathy": "retrieval.datasets.captioned",
    "open_dataset": "retrieval.datasets.protocols",
    "open_index": "retrieval.search",
    "parse_query": "retrieval.queries",
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
