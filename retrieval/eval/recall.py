"""Recall@K between images and captions, exact and reproducible.

The result is one JSON object in CLIP_benchmark's form (its `build` command reads it), with extra
keys for everything that decides the numbers. How ties count: `retrieval.eval.ranks`. Equal captions
get one and the same vector, so they tie exactly. A model that gives every pair the same score
scores about K/N, not 100 %.
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
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import numpy.typing as npt

from enn_core.files.atomic import replacing
from retrieval.datasets.captioned import CaptionDataset, DatasetError, TarImage, image_source
from retrieval.eval.extended_matches import extended_matches
from retrieval.eval.ranks import TIE_RULE, bootstrap_interval, retrieval_ranks

if TYPE_CHECKING:
    from retrieval.eval.feature_cache import FeatureCache
    from retrieval.model.retrieval_model import RetrievalModel

__all__ = [
    "TIE_RULE",
    "Evaluation",
    "bootstrap_interval",
    "embed_images",
    "evaluate",
    "measure",
    "retrieval_ranks",
    "write_result",
]

Progress = Callable[[str, int, int], None]

# What a result calls the precision of the image tower.
DTYPES = {"f32": "float32", "bf16": "bfloat16"}

# Texts and images embedded at a time, and kept by a cache of features; fixed, so that results
# depend neither on the caller's batch size nor on where a run was stopped.
_TEXT_CHUNK = 1024
_IMAGE_CHUNK = 1024


@dataclass(frozen=True, eq=False)
class Evaluation:
    """A result and what it was made from.

    Attributes:
        result: JSON-ready, as `evaluate` describes it.
        dataset: what was asked.
        texts: (M, r) float32.
        images: (N, r) float32.
        to_image: (M,) rank of each caption's image.
        to_text: (N,) rank of each image's best caption.
    """

    result: dict[str, Any]
    dataset: CaptionDataset
    texts: npt.NDArray[np.float32]
    images: npt.NDArray[np.float32]
    to_image: npt.NDArray[np.int64]
    to_text: npt.NDArray[np.int64]


def evaluate(
    model: RetrievalModel,
    dataset: CaptionDataset,
    recall_k: Sequence[int] = (1, 5, 10),
    **options: Any,
) -> dict[str, Any]:
    """Measure text-to-image and image-to-text retrieval.

    Args:
        model: what to measure.
        dataset: images and captions.
        recall_k: the K of Recall@K.
        **options: as for `measure`.

    Returns:
        JSON-ready dict. `metrics` has `image_retrieval_recall@K` (text to image) and
        `text_retrieval_recall@K` (image to text; a hit if any of its captions is in the top K),
        0..1, with `_low` and `_high` bounds, mean and median rank.

    Raises:
        ValueError: for a K below 1.
        ImageError: if an image cannot be read; leaving it out would change the protocol.
        DatasetError: if a caption is cut where the protocol cuts none.
    """
    return measure(model, dataset, recall_k, **options).result


def measure(
    model: RetrievalModel,
    dataset: CaptionDataset,
    recall_k: Sequence[int] = (1, 5, 10),
    *,
    batch_size: int = 32,
    workers: int | None = None,
    bootstrap: int = 1000,
    seed: int = 0,
    progress: Progress | None = None,
    cache: FeatureCache | None = None,
) -> Evaluation:
    """`evaluate`, with the vectors and the rank of every query.

    Args:
        model: what to measure.
        dataset: images and captions.
        recall_k: the K of Recall@K.
        batch_size: images per call of the tower; with OpenVINO it changes no digit of the result.
        workers: decoding threads, by default one per core.
        bootstrap: resamplings for the 95 % intervals; whole images are drawn, with their captions.
        seed: of the resampling.
        progress: called with (stage, done, total); stages are "images", "texts", "ranks".
        cache: vectors of an earlier, stopped run; new ones are added.
    """
    ks = sorted({int(k) for k in recall_k})
    if not ks or ks[0] < 1:
        raise ValueError(f"recall_k must be integers of at least 1, got {list(recall_k)}")
    started = time.perf_counter()
    images = _all_images(model, dataset.images, batch_size, workers, progress, cache)
    images_done = time.perf_counter()
    unique = list(dict.fromkeys(dataset.captions))
    vectors, cut = _all_texts(model, unique, progress, cache)
    if cut and dataset.refuse_long:
        raise DatasetError(
            f"{cut:,} captions are longer than the {model.context_length} tokens that {model.name} "
            f"reads, and the protocol {dataset.protocol!r} cuts none; evaluate a model that reads "
            "more, or another protocol"
        )
    position = {text: i for i, text in enumerate(unique)}
    texts = vectors[[position[text] for text in dataset.captions]]
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
    extended, told = extended_matches(dataset, texts, images, ks)
    metrics |= extended
    finished = time.perf_counter()
    name, weights = split_name(model.name)
    image_seconds, text_seconds = images_done - started, texts_done - images_done
    result = {
        "dataset": dataset.name,
        "model": name,
        "pretrained": weights or model.weights_hash[:12],
        "task": "zeroshot_retrieval",
        "metrics": metrics,
        "language": "en",
        "split": dataset.split,
        "protocol": dataset.protocol,
        "deviations": dataset.deviations,
        "n_images": len(dataset.images),
        "n_captions": len(dataset.captions),
        "n_captions_truncated": cut,
        "dataset_hash": dataset.hash,
        "context_length": model.context_length,
        "tie_rule": TIE_RULE,
        "extended_matches": told,
        "interval": f"95% percentile bootstrap over images, {bootstrap} samples, seed {seed}",
        "seed": seed,
        "weights_hash": model.weights_hash,
        "preprocess_hash": model.preprocess.hash,
        "dim": model.dim,
        "runtime": model.runtime,
        "dtype": DTYPES[model.precision],
        "versions": _versions(model.runtime),
        "date": datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds"),
        "seconds": round(finished - started, 3),
        "images_per_second": round(len(images) / max(image_seconds, 1e-9), 1),
        "texts_per_second": round(len(unique) / max(text_seconds, 1e-9), 1),
        "images_from_cache": cache.images if cache is not None else 0,
    }
    return Evaluation(result, dataset, texts, images, to_image, to_text)


def split_name(name: str) -> tuple[str, str]:
    """Architecture and weights of a model's name; those that bring their own have no second."""
    arch, _, weights = name.partition(":")
    return (name, "") if arch in ("hf-hub", "local-dir") else (arch, weights)


def embed_images(
    model: RetrievalModel,
    paths: Sequence[Path | TarImage],
    *,
    batch_size: int = 32,
    workers: int | None = None,
    draft: bool = True,
    progress: Progress | None = None,
) -> npt.NDArray[np.float32]:
    """Vectors of image files, decoded in threads while the tower runs.

    Args:
        model: whose vectors.
        paths: N files, or members of tars.
        batch_size: images per call of the tower.
        workers: decoding threads, by default one per core.
        draft: let JPEG decoders shrink large photos, as an index does; faster, other pixels.
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
    draft_size = preprocess.draft_size if draft else None

    def pixels(path: Path | TarImage) -> npt.NDArray[np.uint8]:
        try:
            return preprocess(decode(image_source(path), draft_size=draft_size))
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


def _all_images(
    model: RetrievalModel,
    images: Sequence[Path | TarImage],
    batch_size: int,
    workers: int | None,
    progress: Progress | None,
    cache: FeatureCache | None,
) -> npt.NDArray[np.float32]:
    """(N, r), part by part: a part that the cache has is not computed again."""
    vectors = np.empty((len(images), model.dim), dtype=np.float32)
    for start in range(0, len(images), _IMAGE_CHUNK):
        part = images[start : start + _IMAGE_CHUNK]
        end = start + len(part)

        def tell(_stage: str, done: int, _total: int, start: int = start) -> None:
            if progress is not None:
                progress("images", start + done, len(images))

        found = cache.find_images(part) if cache is not None else None
        if found is None:
            # Other tools decode whole photos, and numbers must agree with theirs.
            found = embed_images(
                model, part, batch_size=batch_size, workers=workers, draft=False, progress=tell
            )
            if cache is not None:
                cache.add_images(part, found)
        else:
            tell("images", len(part), len(part))
        vectors[start:end] = found
    return vectors


def _all_texts(
    model: RetrievalModel,
    texts: Sequence[str],
    progress: Progress | None,
    cache: FeatureCache | None,
) -> tuple[npt.NDArray[np.float32], int]:
    """(M, r), and how many were longer than the context."""
    rows, cut = [], 0
    for start in range(0, len(texts), _TEXT_CHUNK):
        part = texts[start : start + _TEXT_CHUNK]
        found = cache.find_texts(part) if cache is not None else None
        if found is None:
            before = model.truncated_texts
            vectors = model.text_vectors(part)
            found = vectors, model.truncated_texts - before
            if cache is not None:
                cache.add_texts(part, *found)
        rows.append(found[0])
        cut += found[1]
        if progress is not None:
            progress("texts", start + len(part), len(texts))
    return np.concatenate(rows), cut


def write_result(result: dict[str, Any], path: str | os.PathLike[str]) -> None:
    """Write a result as JSON, complete or not at all."""
    with replacing(Path(path)) as temporary:
        temporary.write_text(json.dumps(result, indent=2) + "\n", encoding="utf-8")


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
