"""COCO's missing matches: ECCV Caption and CxC, where people said which other pairs fit too.

Of COCO's 5,000 test photos and captions many fit each other without being paired, so that right
answers count as wrong. The package `eccv_caption` (MIT) has the judgements; it is used if it is
installed and the data set is Karpathy's COCO test with its numbers.
"""

from __future__ import annotations

import contextlib
import io
import warnings
from collections.abc import Sequence
from typing import TYPE_CHECKING

import numpy as np
import numpy.typing as npt

from retrieval.eval.ranks import top_items

if TYPE_CHECKING:
    from retrieval.datasets.captioned import CaptionDataset

__all__ = ["extended_matches"]

# The two directions in eccv_caption's words and in CLIP_benchmark's.
_DIRECTIONS = {"t2i": "image_retrieval", "i2t": "text_retrieval"}


def extended_matches(
    dataset: CaptionDataset,
    texts: npt.NDArray[np.float32],
    images: npt.NDArray[np.float32],
    recall_k: Sequence[int],
) -> tuple[dict[str, float], str]:
    """Metrics against the extended matches, and one line that says what was done.

    Args:
        dataset: with COCO's numbers of images and captions.
        texts: (M, r).
        images: (N, r).
        recall_k: the K of CxC's Recall@K.

    Returns:
        `image_retrieval_cxc_recall@K`, `..._eccv_map@r`, `..._eccv_rprecision` and
        `..._eccv_recall@1`, and the same of `text_retrieval`; empty where they do not apply.
    """
    if not dataset.image_ids or not dataset.caption_ids:
        return {}, ""
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # that ujson would be faster
            import eccv_caption
    except ModuleNotFoundError:
        return {}, "not measured; pip install eccv_caption"
    metrics = eccv_caption.Metrics()
    judged = (metrics.eccv_gts, metrics.cxc_gts)
    asked_images = set().union(*(found["i2t"] for found in judged))
    asked_texts = set().union(*(found["t2i"] for found in judged))
    if not asked_images <= set(dataset.image_ids) or not asked_texts <= set(dataset.caption_ids):
        return {}, "not measured: this is not the whole of COCO's Karpathy test"
    most = {
        way: max(len(found) for judgement in judged for found in judgement[way].values())
        for way in _DIRECTIONS
    }
    lists = {
        "t2i": _lists(texts, images, dataset.caption_ids, dataset.image_ids, asked_texts,
                      max(most["t2i"], *recall_k)),
        "i2t": _lists(images, texts, dataset.image_ids, dataset.caption_ids, asked_images,
                      max(most["i2t"], *recall_k)),
    }  # fmt: skip
    found: dict[str, float] = {}
    with contextlib.redirect_stderr(io.StringIO()):  # progress bars that cannot be switched off
        for k in recall_k:
            for way, value in metrics.cxc_recalls(lists, "all", K=k).items():
                found[f"{_DIRECTIONS[way]}_cxc_recall@{k}"] = float(value)
        names = (("map_at_r", "map@r"), ("rprecision", "rprecision"), ("r1", "recall@1"))
        scores = metrics.eccv_metrics(lists, "all")
        for theirs, ours in names:
            for way, value in scores[f"eccv_{theirs}"].items():
                found[f"{_DIRECTIONS[way]}_eccv_{ours}"] = float(value)
    return found, "ECCV Caption and CxC, by eccv_caption"


def _lists(
    queries: np.ndarray,
    items: np.ndarray,
    query_ids: Sequence[int],
    item_ids: Sequence[int],
    asked: set[int],
    count: int,
) -> dict[int, list[int]]:
    which = [place for place, number in enumerate(query_ids) if number in asked]
    ids = np.asarray(item_ids)
    top = top_items(queries, items, which, count)
    return {query_ids[q]: row for q, row in zip(which, ids[top].tolist(), strict=True)}
