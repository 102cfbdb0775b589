"""From a click to the new ranking, fsync included, and what a lesson takes on disk.

    python benchmarks/feedback_speed.py              # 10,000 and 100,000 vectors
    python benchmarks/feedback_speed.py --million    # also 1,000,000 (6 GB)

The vectors are those of Flickr8k's `val` pictures with noise, one row in so many of the same
picture. For each query the page's steps are repeated: search, mark five results good and five bad,
teach, search again; by the rules "lookup", "adapter", and "local", which changes the spectrum. CPU
time stands beside wall time: on a busy machine only that says something. Queries are encoded once,
by the first search.
Writes `benchmarks/results/feedback_speed.csv`.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
from feedback_data import Gallery, Texts, flickr8k, make_index
from record import write_rows
from threadpoolctl import threadpool_limits

import retrieval
from retrieval.model.retrieval_model import RetrievalModel
from retrieval.search import Searcher
from retrieval.teach.guard import encode_protected
from retrieval.teach.teacher import Teacher

LESSONS = 30
MANY = 100  # lessons after which another is measured again
MARKS = 10
RULES = ("lookup", "adapter", "local")


def blocks(vectors: np.ndarray, count: int) -> Iterator[np.ndarray]:
    """Rows like those of real pictures, (rows, r) at a time, unit norm."""
    rng = np.random.default_rng(0)
    spread = vectors.std(0)
    for start in range(0, count, 20_000):
        rows = vectors[rng.integers(0, len(vectors), min(20_000, count - start))]
        rows = rows + 0.5 * spread * rng.standard_normal(rows.shape, np.float32)
        yield (rows / np.linalg.norm(rows, axis=1, keepdims=True)).astype(np.float32)


class Clock:
    """Wall and CPU milliseconds of steps, by name."""

    def __init__(self) -> None:
        self.times: dict[str, list[tuple[float, float]]] = {}

    def __call__(self, name: str, started: tuple[float, float]) -> None:
        now = self.now()
        spent = (1000 * (now[0] - started[0]), 1000 * (now[1] - started[1]))
        self.times.setdefault(name, []).append(spent)

    @staticmethod
    def now() -> tuple[float, float]:
        return time.perf_counter(), time.process_time()

    def rows(self) -> Iterator[dict[str, Any]]:
        for name, times in self.times.items():
            wall, cpu = ([each[i] for each in times] for i in (0, 1))
            yield {
                "measured": name,
                "wall_ms": round(statistics.median(wall), 2),
                "wall_ms_p90": round(float(np.percentile(wall, 90)), 2),
                "cpu_ms": round(statistics.median(cpu), 2),
                "times": len(times),
            }


def click_rows(
    searcher: Searcher, place: Path, queries: list[str], rule: str
) -> Iterator[dict[str, Any]]:
    """Lessons on one query after another, each followed by its search."""
    clock = Clock()
    with Teacher.open(searcher.model, path=place / f"{rule}.sqlite") as teacher:
        with_profile = searcher.with_teacher(teacher)
        for number, query in enumerate(queries):
            found = [hit.id for hit in with_profile.search(query, k=MARKS)]
            marks = {"good": found[::2], "bad": found[1::2]}
            started = clock.now()
            with_profile.teach(query, **marks, rule=rule, force=True)
            between = clock.now()
            with_profile.search(query, k=20)
            kind = "first lesson" if number == 0 else "lesson"
            clock(f"{kind}: click to new ranking", started)
            if number:
                clock("its search", between)
                repeated = clock.now()
                with_profile.search(query, k=20)
                clock("the same search again", repeated)
        started = clock.now()
        with_profile.undo()
        with_profile.search(queries[-1], k=20)
        clock("undo: click to new ranking", started)
    for row in clock.rows():
        yield {"rule": rule, "vectors": len(searcher.index), **row}


def many_rows(
    searcher: Searcher, place: Path, queries: list[str], rule: str
) -> Iterator[dict[str, Any]]:
    """What the last lessons take when many queries are taught."""
    clock = Clock()
    with Teacher.open(searcher.model, path=place / f"{rule}-many.sqlite") as teacher:
        with_profile = searcher.with_teacher(teacher)
        for number, query in enumerate(queries, 1):
            found = [hit.id for hit in with_profile.search(query, k=MARKS)]
            started = clock.now()
            with_profile.teach(query, found[::2], found[1::2], rule=rule, force=True)
            with_profile.search(query, k=20)
            if number > len(queries) - 10:
                clock(f"lesson {len(queries)}: click to new ranking", started)
    for row in clock.rows():
        yield {"rule": rule, "vectors": len(searcher.index), **row}


def bytes_rows(
    searcher: Searcher, place: Path, queries: list[str], rule: str
) -> Iterator[dict[str, Any]]:
    """Bytes per taught query: of one lesson, and of three on the same query."""
    for lessons in (1, 3):
        path = place / f"{rule}-{lessons}.sqlite"
        sizes, logical = [], 0
        for query in queries:
            with Teacher.open(searcher.model, path=path) as teacher:
                with_profile = searcher.with_teacher(teacher)
                found = [hit.id for hit in with_profile.search(query, k=MARKS * lessons)]
                for start in range(0, len(found), MARKS):
                    ids = found[start : start + MARKS]
                    with_profile.teach(query, ids[::2], ids[1::2], rule=rule, force=True)
                journal = teacher._existing()
                events = journal.events() if journal is not None else []
            sizes.append(path.stat().st_size)
        logical = sum(
            sum(array.nbytes for array in event.arrays.values())
            + len(json.dumps(event.details))
            + len(event.subject.encode())
            for event in events
        )
        yield {
            "rule": rule,
            "vectors": len(searcher.index),
            "measured": f"taught query, {lessons} x {MARKS} marks",
            "bytes_on_disk": round((sizes[-1] - sizes[0]) / (len(sizes) - 1)),
            "bytes_of_content": round(logical / len(queries)),
            "bytes_of_a_profile_with_one": sizes[0],
            "times": len(queries),
        }


def sync_row(place: Path) -> dict[str, Any]:
    """What this disk takes to make 4 kB durable."""
    clock = Clock()
    with (place / "sync").open("wb") as file:
        for _ in range(30):
            started = clock.now()
            file.write(bytes(4096))
            file.flush()
            os.fsync(file.fileno())
            clock("fsync of 4 kB alone", started)
    return next(clock.rows())


def size_rows(model: RetrievalModel, gallery: Gallery, count: int) -> Iterator[dict[str, Any]]:
    queries = [concept.query for concept in gallery.concepts][:LESSONS]
    captions = list(dict.fromkeys(gallery.captions))[:: len(gallery.captions) // MANY][:MANY]
    with tempfile.TemporaryDirectory() as folder:
        place = Path(folder)
        make_index(place / "index", model, count, blocks(gallery.vectors, count))
        with retrieval.open_index(place / "index", model) as searcher:
            yield sync_row(place)
            for rule in RULES:
                yield from click_rows(searcher, place, queries, rule)
                if count == 10_000:
                    yield from bytes_rows(searcher, place, queries, rule)
                    yield from many_rows(searcher, place, captions, rule)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--data", type=Path, default=os.environ.get("ENN_DATA", "../shared/data"))
    parser.add_argument("--million", action="store_true", help="also 1,000,000 vectors (6 GB)")
    parser.add_argument("--threads", type=int, help="of every library; by default their own choice")
    arguments = parser.parse_args()
    threadpool_limits(arguments.threads)
    model = retrieval.load()
    encode_protected(model)
    gallery = flickr8k(Texts(model), Path(arguments.data), "val")
    rows: list[dict[str, Any]] = []
    for count in (10_000, 100_000, *([1_000_000] if arguments.million else [])):
        for row in size_rows(model, gallery, count):
            print(row, flush=True)
            rows.append(row)
    print(write_rows("feedback_speed", rows))


if __name__ == "__main__":
    main()
