"""What a profile costs as it grows: lessons, import, undo of the oldest, opening, bytes.

    python benchmarks/feedback_growth.py             # about five minutes

Lessons are made: each caption of a training picture is taught ten marks, and its target lies a
fixed way towards another picture's vector. They are written as lessons are, in one transaction;
what is measured is real: a lesson more on an index of 10,000 vectors, from the call to the durable
result and to the new ranking, the undo of the first lesson, export and import into a fresh profile,
and opening. Writes `benchmarks/results/feedback_growth.csv` and a plot in docs/images.
"""

from __future__ import annotations

import argparse
import gc
import os
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
from feedback_data import Gallery, Texts, flickr8k, make_index
from feedback_speed import blocks
from record import write_rows
from threadpoolctl import threadpool_limits

import retrieval
from enn_core.lessons.events import TEACH
from retrieval.search import Searcher
from retrieval.teach.guard import encode_protected
from retrieval.teach.knowledge import ADAPTER, LOOKUP
from retrieval.teach.teacher import Teacher

SIZES = (50, 400, 1000, 3000)
VECTORS = 10_000
MARKS = 10
PLOT = Path(__file__).parents[1] / "docs" / "images" / "feedback_growth.png"


def write_lessons(teacher: Teacher, gallery: Gallery, texts: list[str], rule: str) -> None:
    """Lessons on texts, as `Teacher.teach` writes them."""
    rng = np.random.default_rng(0)
    c = gallery.texts(texts)
    c /= np.linalg.norm(c, axis=1, keepdims=True)
    b = c + 0.5 * gallery.vectors[rng.integers(0, len(gallery.vectors), len(c))]
    b /= np.linalg.norm(b, axis=1, keepdims=True)
    with teacher._lock, teacher._writing() as (writing, _):
        for text, asked, target in zip(texts, c, b, strict=True):
            ids = rng.choice(VECTORS, MARKS, replace=False) + 1
            marks = [[int(id_), f"{id_:016x}", 1 if i % 2 else -1] for i, id_ in enumerate(ids)]
            details = {"marks": marks, "rule": rule, "marks_left": MARKS, "kept_text": False}
            arrays = {"c": asked.astype(np.float16), "b": target.astype(np.float16)}
            writing.append(TEACH, " ".join(text.split()), details, arrays, ())
    teacher._changed()


def timed(what: Callable[[], Any]) -> float:
    gc.collect()
    started = time.perf_counter()
    what()
    return round(time.perf_counter() - started, 4)


def measure(
    searcher: Searcher, gallery: Gallery, texts: list[str], rule: str, place: Path
) -> dict[str, Any]:
    model, index = searcher.model, searcher.index
    path, copy = place / f"{rule}-{len(texts)}.sqlite", place / f"{rule}-{len(texts)}-copy.sqlite"
    with Teacher.open(model, path=path) as teacher:
        write_lessons(teacher, gallery, texts[:-2], rule)
    row: dict[str, Any] = {"rule": rule, "lessons": len(texts) - 2}
    opened: list[Teacher] = []
    row["open_s"] = timed(lambda: opened.append(Teacher.open(model, path=path)))
    with opened[0] as teacher:
        row["bytes_per_lesson"] = round(path.stat().st_size / len(texts))
        found = [id_ for id_, _ in index.search(searcher.query_vector(texts[-1]), MARKS)]
        marks = found[::2], found[1::2]
        searcher.query_vector(texts[-2])
        taught = searcher.with_teacher(teacher)
        taught.teach(texts[-2], *marks, force=True)  # reads what the guard keeps
        row["lesson_s"] = timed(lambda: taught.teach(texts[-1], *marks, force=True))
        row["search_s"] = timed(lambda: taught.search(texts[-1], k=20))
        file = place / "out.json"
        row["export_s"] = timed(lambda: teacher.export(file))
        with Teacher.open(model, path=copy) as other:
            row["import_s"] = timed(lambda: other.import_(file))
            after = searcher.with_teacher(other)
            row["first_lesson_after_import_s"] = timed(
                lambda: after.teach(texts[-1], [marks[0][0]], force=True)
            )
        row["undo_oldest_s"] = timed(lambda: taught.undo(1))
        row["lesson_after_undo_s"] = timed(lambda: taught.teach(texts[-2], *marks, force=True))
    return row


def rows(data: Path, sizes: list[int], rules: list[str]) -> Iterator[dict[str, Any]]:
    model = retrieval.load()
    encode_protected(model)
    gallery = flickr8k(Texts(model), data, "train", 1000)
    captions = list(dict.fromkeys(" ".join(caption.split()) for caption in gallery.captions))
    with tempfile.TemporaryDirectory() as folder:
        place = Path(folder)
        make_index(place / "index", model, VECTORS, blocks(gallery.vectors, VECTORS))
        with retrieval.open_index(place / "index", model) as searcher:
            for rule in rules:
                for size in sizes:
                    yield measure(searcher, gallery, captions[: size + 2], rule, place)


def plot(table: list[dict[str, Any]]) -> None:
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot as plt

    figure, axes = plt.subplots(1, 2, figsize=(9, 3.4), layout="constrained")
    for axis, (column, title) in zip(
        axes,
        (("lesson_s", "one lesson more"), ("undo_oldest_s", "undo of the oldest")),
        strict=True,
    ):
        for rule in dict.fromkeys(row["rule"] for row in table):
            own = [row for row in table if row["rule"] == rule]
            axis.plot(
                [r["lessons"] for r in own], [1000 * r[column] for r in own], "o-", label=rule
            )
        axis.set(xscale="log", yscale="log", title=title, xlabel="lessons", ylabel="ms")
        axis.grid(alpha=0.3)
        axis.legend(frameon=False)
    PLOT.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(PLOT, dpi=110)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--data", type=Path, default=os.environ.get("ENN_DATA", "../shared/data"))
    parser.add_argument("--sizes", type=int, nargs="+", default=list(SIZES))
    parser.add_argument("--rules", nargs="+", default=[LOOKUP, ADAPTER])
    parser.add_argument("--threads", type=int, help="of every library; by default their own choice")
    parser.add_argument("--dry", action="store_true", help="write nothing")
    arguments = parser.parse_args()
    threadpool_limits(arguments.threads)
    table = []
    for row in rows(Path(arguments.data), arguments.sizes, arguments.rules):
        print(row, flush=True)
        table.append(row)
    if not arguments.dry:
        plot(table)
        print(write_rows("feedback_growth", table))


if __name__ == "__main__":
    main()
