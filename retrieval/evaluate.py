"""Recall@K from Python; the work is in `retrieval.eval`."""

from retrieval.eval.recall import evaluate, write_result

__all__ = ["evaluate", "write_result"]
