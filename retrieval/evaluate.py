"""Recall@K between images and captions, exact and reproducible.

The result is one JSON object in CLIP_benchmark's form (its `build` command reads it), with extra
keys for everything that decides the numbers.

Ties: scores are products of float32 vectors summed in float64 and rounded to 9 decimals; of equal
scores the earlier item of the data set ranks first. Equal captions get one and the same vector, so
they tie exactly. A model that gives every pair the same score scores about K/N, not 100 %.
"""

from __future__ import annotations

import datetime
import importlib.metadata
import json
import os
import time
from collections import deque
from collections.abc import Callable, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import numpy.typing as npt

from retrieval.atomic import replacing

if TYPE_CHECKING:
    from retrieval.datasets import CaptionDataset
    from retrieval.models import RetrievalModel

__all__ = [
    "TIE_RULE",
    "bootstrap_interval",
    "embed_images",
    "evaluate",
    "retrieval_ranks",
    "write_result",
]

TIE_RULE = "scores rounded to 9 decimals; equal scores: earlier item of the data set first"

Progress = Callable[[str, int, int], None]

# Texts embedded at a time; fixed, so that results do not depend on the caller's batch size.
_TEXT_CHUNK = 1024

# Bytes of scores held at a time.
_SCORE_BYTES = 32 * 2**20

_SCORE_DECIMALS = 9


def evaluate(
    model: RetrievalModel,
    dataset: CaptionDataset,
    recall_k: Sequence[int] = (1, 5, 10),
    *,
    batch_size: int = 32,
    workers: int | None = None,
    bootstrap: int = 1000,
    seed: int = 0,
    progress: Progress | None = None,
) -> dict[str, Any]:
    """Measure text-to-image and image-to-text retrieval.

    Args:
        model: what to measure.
        dataset: images and captions.
        recall_k: the K of Recall@K.
        batch_size: images per call of the tower; with OpenVINO it changes no digit of the result.
        workers: decoding threads, by default one per core.
        bootstrap: resamplings for the 95 % intervals; whole images are drawn, with their captions.
        seed: of the resampling.
        progress: called with (stage, done, total); stages are "images", "texts", "ranks".

    Returns:
        JSON-ready dict. `metrics` has `image_retrieval_recall@K` (text to image) and
        `text_retrieval_recall@K` (image to text; a hit if any of its captions is in the top K),
        0..1, with `_low` and `_high` bounds, mean and median rank.

    Raises:
        ValueError: for a K below 1.
        ImageError: if an image cannot be read; leaving it out would change the protocol.
    """
    ks = sorted({int(k) for k in recall_k})
    if not ks or ks[0] < 1:
        raise ValueError(f"recall_k must be integers of at least 1, got {list(recall_k)}")
    started = time.perf_counter()
    images = embed_images(
        model, dataset.images, batch_size=batch_size, workers=workers, progress=progress
    )
    images_done = time.perf_counter()
    cut_before = model.truncated_texts
    unique = list(dict.fromkeys(dataset.captions))
    position = {text: i for i, text in enumerate(unique)}
    rows = []
    for start in range(0, len(unique), _TEXT_CHUNK):
        rows.append(model.text_vectors(unique[start : start + _TEXT_CHUNK]))
        if progress is not None:
            progress("texts", min(start + _TEXT_CHUNK, len(unique)), len(unique))
    texts = np.concatenate(rows)[[position[text] for text in dataset.captions]]
    texts_done = time.perf_counter()
    to_image, to_text = retrieval_ranks(texts, images, dataset.image_of_caption, progress=progress)
    metrics: dict[str, float] = {}
    for name, ranks, owners in (
        ("image_retrieval", to_image, dataset.image_of_caption),
        ("text_retrieval", to_text, np.arange(len(images))),
    ):
        for k in ks:
            hits = ranks <= k
            low, high = bootstrap_interval(hits, owners, samples=bootstrap, seed=seed)
            metrics[f"{name}_recall@{k}"] = float(hits.mean())
            metrics[f"{name}_recall@{k}_low"] = low
            metrics[f"{name}_recall@{k}_high"] = high
        metrics[f"{name}_mean_rank"] = float(ranks.mean())
        metrics[f"{name}_median_rank"] = float(np.median(ranks))
    finished = time.perf_counter()
    name, _, weights = model.name.partition(":")
    if name in ("hf-hub", "local-dir"):
        name, weights = model.name, ""
    image_seconds, text_seconds = images_done - started, texts_done - images_done
    return {
        "dataset": dataset.name,
        "model": name,
        "pretrained": weights or model.weights_hash[:12],
        "task": "zeroshot_retrieval",
        "metrics": metrics,
        "language": "en",
        "split": dataset.split,
        "protocol": dataset.protocol,
        "n_images": len(dataset.images),
        "n_captions": len(dataset.captions),
        "n_captions_truncated": model.truncated_texts - cut_before,
        "context_length": model.context_length,
        "tie_rule": TIE_RULE,
        "interval": f"95% percentile bootstrap over images, {bootstrap} samples, seed {seed}",
        "weights_hash": model.weights_hash,
        "preprocess_hash": model.preprocess.hash,
        "dim": model.dim,
        "runtime": model.runtime,
        "dtype": "float32",
        "versions": _versions(model.runtime),
        "date": datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds"),
        "seconds": round(finished - started, 3),
        "images_per_second": round(len(images) / max(image_seconds, 1e-9), 1),
        "texts_per_second": round(len(unique) / max(text_seconds, 1e-9), 1),
    }


def embed_images(
    model: RetrievalModel,
    paths: Sequence[Path],
    *,
    batch_size: int = 32,
    workers: int | None = None,
    progress: Progress | None = None,
) -> npt.NDArray[np.float32]:
    """Vectors of image files, decoded in threads while the tower runs.

    Args:
        model: whose vectors.
        paths: N files.
        batch_size: images per call of the tower.
        workers: decoding threads, by default one per core.
        progress: called with ("images", done, total).

    Returns:
        (N, r) float32, in the order of paths. Besides it, only a few batches are in memory.

    Raises:
        ImageError: naming the file that cannot be read.
    """
    from retrieval.images import ImageError, decode

    if batch_size < 1:
        raise ValueError(f"batch_size must be at least 1, got {batch_size}")
    preprocess = model.preprocess

    def pixels(path: Path) -> npt.NDArray[np.uint8]:
        try:
            return preprocess(decode(path, draft_size=preprocess.draft_size))
        except (ImageError, OSError) as error:
            raise ImageError(f"cannot read {path}: {error}") from error

    vectors = np.zeros((len(paths), model.dim), dtype=np.float32)
    ahead: deque[Future[npt.NDArray[np.uint8]]] = deque()
    with ThreadPoolExecutor(workers or _cores()) as pool:
        waiting = iter(paths)
        try:
            for start in range(0, len(paths), batch_size):
                end = min(start + batch_size, len(paths))
                # Two batches ahead: the threads stay busy while the tower runs.
                while len(ahead) < 3 * batch_size and (path := next(waiting, None)) is not None:
                    ahead.append(pool.submit(pixels, path))
                batch = np.stack([ahead.popleft().result() for _ in range(end - start)])
                vectors[start:end] = model.image_vectors(batch)
                if progress is not None:
                    progress("images", end, len(paths))
        finally:
            pool.shutdown(cancel_futures=True)
    return vectors


def retrieval_ranks(
    texts: npt.NDArray[np.float32],
    images: npt.NDArray[np.float32],
    image_of_caption: npt.NDArray[np.integer[Any]],
    *,
    chunk: int | None = None,
    progress: Progress | None = None,
) -> tuple[npt.NDArray[np.int64], npt.NDArray[np.int64]]:
    """Ranks of the right answers, 1 the best, under this module's tie rule.

    Args:
        texts: (M, r) query coordinates of captions.
        images: (N, r) stored vectors; every image has at least one caption.
        image_of_caption: (M,) position in images.
        chunk: queries scored at a time; by default 32 MB of scores.
        progress: called with ("ranks", done, total).

    Returns:
        (M,) rank of each caption's image among the images, and (N,) rank of each image's best
        caption among the captions.
    """
    owners = np.asarray(image_of_caption, dtype=np.int64)
    to_image = np.empty(len(texts), dtype=np.int64)
    to_text = np.empty(len(images), dtype=np.int64)
    total = len(texts) + len(images)
    for rows in _chunks(len(texts), len(images), chunk):
        scores = _scores(texts[rows], images)
        to_image[rows] = _rank(scores, owners[rows])
        if progress is not None:
            progress("ranks", rows.stop, total)
    for rows in _chunks(len(images), len(texts), chunk):
        scores = _scores(images[rows], texts)
        own = owners[None, :] == np.arange(rows.start, rows.stop)[:, None]
        # argmax takes the first of equal scores: the caption that the tie rule ranks first.
        best = np.where(own, scores, -np.inf).argmax(axis=1)
        to_text[rows] = _rank(scores, best)
        if progress is not None:
            progress("ranks", len(texts) + rows.stop, total)
    return to_image, to_text


def bootstrap_interval(
    hits: npt.NDArray[Any],
    owners: npt.NDArray[np.integer[Any]],
    *,
    samples: int = 1000,
    seed: int = 0,
) -> tuple[float, float]:
    """95 % percentile interval of mean(hits) when whole images are drawn again.

    Args:
        hits: (M,) booleans, one per query.
        owners: (M,) image that each query belongs to, 0..N-1.
        samples: resamplings; 0 gives the mean itself twice.
        seed: the same seed draws the same images for any hits, so differences can be paired.
    """
    mean = float(np.mean(hits))
    if samples < 1:
        return mean, mean
    won = np.bincount(owners, weights=np.asarray(hits, dtype=np.float64))
    asked = np.bincount(owners).astype(np.float64)
    rng = np.random.default_rng(seed)
    means = np.empty(samples)
    for i in range(samples):
        drawn = rng.integers(0, len(won), len(won))
        means[i] = won[drawn].sum() / asked[drawn].sum()
    low, high = np.percentile(means, [2.5, 97.5])
    return float(low), float(high)


def write_result(result: dict[str, Any], path: str | os.PathLike[str]) -> None:
    """Write a result as JSON, complete or not at all."""
    with replacing(Path(path)) as temporary:
        temporary.write_text(json.dumps(result, indent=2) + "\n", encoding="utf-8")


def _scores(queries: np.ndarray, items: np.ndarray) -> npt.NDArray[np.float64]:
    return np.round(queries.astype(np.float64) @ items.astype(np.float64).T, _SCORE_DECIMALS)


def _rank(scores: np.ndarray, targets: np.ndarray) -> npt.NDArray[np.int64]:
    reached = np.take_along_axis(scores, targets[:, None], axis=1)
    before = np.arange(scores.shape[1])[None, :] < targets[:, None]
    return 1 + ((scores > reached) | ((scores == reached) & before)).sum(axis=1)


def _chunks(rows: int, columns: int, chunk: int | None) -> list[slice]:
    size = chunk or max(1, _SCORE_BYTES // (8 * max(columns, 1)))
    return [slice(start, min(start + size, rows)) for start in range(0, rows, size)]


def _cores() -> int:
    # Not os.cpu_count(): containers and taskset may grant fewer.
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def _versions(runtime: str) -> str:
    packages = ["eigen-suite", "torch", "numpy", "pillow", "open_clip_torch", runtime]
    found = []
    for package in dict.fromkeys(packages):
        try:
            found.append(f"{package} {importlib.metadata.version(package)}")
        except importlib.metadata.PackageNotFoundError:
            continue
    return "; ".join(found)
