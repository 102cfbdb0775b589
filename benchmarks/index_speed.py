"""Speed of the eigen-index: opening, searching, and finding out that nothing has changed.

    python benchmarks/index_speed.py              # 10,000 and 100,000 vectors, 20,000 files
    python benchmarks/index_speed.py --million    # also 1,000,000, where the ANN is at work

The vectors are synthetic: unit vectors of length 384 around 2,000 centres with a falling spectrum,
and queries of the same kind. They say nothing about the quality of a model, and clusters flatter an
ANN's recall: benchmarks/ann_recall.py measures that on real vectors. The files are small synthetic
JPEG images. CPU time stands beside wall time: on a busy machine only that says something. Writes
`benchmarks/results/index_speed.csv`.
"""

from __future__ import annotations

import argparse
import statistics
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import closing
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image
from record import write_rows

from retrieval.eigen_coordinates import EigenBasis, scores
from retrieval.index import snapshot as snapshots
from retrieval.index.catalog import Catalog, Entry
from retrieval.index.eigen_index import EigenIndex
from retrieval.index.writer import ANN_FROM

DIM = 384
QUERIES = 30


class SyntheticModel:
    """Stands for a model where only the index is measured: mean colours through a random map."""

    preprocess: Any

    def __init__(self) -> None:
        weight = np.random.default_rng(0).normal(size=(DIM, 3 * 14 * 14))
        self.basis = EigenBasis.from_weight(weight)
        self.dim = DIM
        self.preprocess = self.shrink

    @staticmethod
    def shrink(image: Image.Image) -> np.ndarray:
        return np.asarray(image.resize((14, 14)))

    def image_vectors(self, pixels: np.ndarray) -> np.ndarray:
        return self.basis.vectors(pixels.reshape(len(pixels), -1) / 127.5 - 1)

    def fingerprint(self) -> dict[str, Any]:
        return {"model": "synthetic", "weights": "none", "preprocess": "14", "dim": DIM}


def blocks(count: int, seed: int = 0) -> Iterator[np.ndarray]:
    """Synthetic unit vectors (rows, DIM), in blocks."""
    spectrum = (1 / np.sqrt(1 + np.arange(DIM))).astype(np.float32)
    centres = np.random.default_rng(1).standard_normal((2000, DIM), np.float32)
    rng = np.random.default_rng(seed)
    for start in range(0, count, 20_000):
        rows = min(20_000, count - start)
        vectors = centres[rng.integers(0, len(centres), rows)]
        vectors = (vectors + rng.standard_normal((rows, DIM), np.float32)) * spectrum
        yield vectors / np.linalg.norm(vectors, axis=1, keepdims=True)


def timed(action: Callable[[], Any], repeats: int) -> dict[str, float]:
    """Median wall and CPU milliseconds of an action, after one run to warm up."""
    action()
    wall, cpu = [], []
    for _ in range(repeats):
        started, used = time.perf_counter(), time.process_time()
        action()
        wall.append(1000 * (time.perf_counter() - started))
        cpu.append(1000 * (time.process_time() - used))
    return {
        "wall_ms": round(statistics.median(wall), 3),
        "cpu_ms": round(statistics.median(cpu), 3),
    }


def build(folder: Path, count: int) -> tuple[EigenIndex, float]:
    """An index of synthetic vectors, written as an update would publish it; seconds of the ANN."""
    index = EigenIndex.create(folder, SyntheticModel())
    index.close()
    seconds = 0.0
    name, ann = "vectors-1.faiss", None
    digests = snapshots.write(folder, name, np.arange(1, count + 1), blocks(count), DIM)
    if count >= ANN_FROM:
        ann = "ann-1.faiss"
        flat = snapshots.Snapshot(folder, name, None, DIM, digests)
        started = time.perf_counter()
        digests = replace(digests, ann=snapshots.build_ann(folder, ann, flat))
        seconds = time.perf_counter() - started
    with closing(Catalog.open(folder, write=True)) as catalog, catalog.writing():
        for number in range(count):
            catalog.put(Entry(0, f"{number:07d}.jpg"))
        catalog.commit_snapshot(name, ann, digests.packed, 1)
    return EigenIndex.open(folder), seconds


def search_rows(folder: Path, count: int) -> Iterator[dict[str, Any]]:
    index, ann_seconds = build(folder, count)
    queries = np.concatenate(list(blocks(QUERIES, seed=2)))
    turn = iter(range(10**9))
    delta = np.exp(0.2 * np.random.default_rng(3).normal(size=DIM)).astype(np.float32)

    def search(**options: Any) -> None:
        index.search(queries[next(turn) % QUERIES], 20, **options)

    def row(what: str, **values: Any) -> dict[str, Any]:
        return {"measured": what, "count": count, "dim": DIM, **values}

    def first() -> None:
        """As the first query of a process, which compares every block with its digest."""
        with EigenIndex.open(folder) as opened:
            opened.search(queries[0], 20)

    yield row("open", **timed(lambda: EigenIndex.open(folder).close(), 10))
    yield row("open and first search", **timed(first, 10))
    if not index.stats()["ann"]:
        yield row("search, exact scan", **timed(search, QUERIES))
        yield row("search, exact scan, changed spectrum", **timed(lambda: search(delta=delta), 10))
        return
    yield row("build ANN", wall_ms=round(1000 * ann_seconds))
    yield row("search, ANN + exact re-rank", **timed(search, QUERIES), **recall(index, queries))
    yield row(
        "search, ANN + exact re-rank, changed spectrum",
        **timed(lambda: search(delta=delta), QUERIES),
        **recall(index, queries, delta),
    )
    index.ann_candidates = count  # more than the ANN is asked for: a full scan
    yield row("search, exact scan", **timed(search, 10))
    yield row("search, exact scan, changed spectrum", **timed(lambda: search(delta=delta), 5))


def recall(index: EigenIndex, queries: np.ndarray, delta: np.ndarray | None = None) -> dict:
    """Share of the true ten best that the index finds."""
    stored = index.vectors(index.ids())
    hits = 0
    for q in queries[:15]:
        truth = scores(q, stored, delta)
        best = set((np.argpartition(-truth, 9)[:10] + 1).tolist())
        hits += len(best & {id_ for id_, _ in index.search(q, 10, delta=delta)})
    return {"recall@10": round(hits / 150, 4)}


def update_rows(folder: Path, count: int) -> Iterator[dict[str, Any]]:
    """An update that finds everything new, then one that finds nothing new."""
    root, rng = folder / "photos", np.random.default_rng(0)
    for number in range(count):
        path = root / f"{number // 1000:03d}" / f"{number:06d}.jpg"
        path.parent.mkdir(parents=True, exist_ok=True)
        noise = rng.integers(0, 255, (16, 16, 3), dtype=np.uint8)
        Image.fromarray(noise).resize((160, 120)).save(path, quality=85)
    model = SyntheticModel()
    time.sleep(0.1)
    with EigenIndex.create(folder / "index", model) as index:
        for what in ("update, all new (160x120 JPEG, no model)", "update, nothing new"):
            started, used = time.perf_counter(), time.process_time()
            report = index.update(root, model, batch_size=128)
            wall, cpu = time.perf_counter() - started, time.process_time() - used
            expected = (count, 0) if "all new" in what else (0, count)
            if (report.added, report.unchanged) != expected:
                raise RuntimeError(f"the update did something else: {report}")
            yield {
                "measured": what,
                "count": count,
                "dim": DIM,
                "wall_ms": round(1000 * wall),
                "cpu_ms": round(1000 * cpu),
                "files/s": round(count / wall),
                "files/cpu s": round(count / cpu),
            }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--million", action="store_true", help="also 1,000,000 vectors (6 GB)")
    parser.add_argument("--files", type=int, default=20_000, help="files of the update test")
    arguments = parser.parse_args()
    rows = []
    for count in (10_000, 100_000, *([1_000_000] if arguments.million else [])):
        with tempfile.TemporaryDirectory() as folder:
            for row in search_rows(Path(folder) / "index", count):
                print(row, flush=True)
                rows.append(row)
    with tempfile.TemporaryDirectory() as folder:
        for row in update_rows(Path(folder), arguments.files):
            print(row, flush=True)
            rows.append(row)
    print(write_rows("index_speed", rows))


if __name__ == "__main__":
    main()
