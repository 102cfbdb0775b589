"""Time from a typed query to ranked pictures, on the sample gallery and the shipped model.

    python benchmarks/query_speed.py

Queries differ, so no vector is remembered. Writes `benchmarks/results/query_speed.csv`.
"""

from __future__ import annotations

import statistics
import tempfile
import time
from pathlib import Path

from record import write_rows

import retrieval

GALLERY = Path(__file__).parent.parent / "apps" / "gallery"


def main() -> None:
    with tempfile.TemporaryDirectory() as folder:
        model = retrieval.load()
        with retrieval.EigenIndex.create(Path(folder) / "index", model) as index:
            index.update(GALLERY, model)
        start = time.perf_counter()
        searcher = retrieval.open_index(Path(folder) / "index")
        searcher.search("a first query")
        first = time.perf_counter() - start
        queries = (GALLERY / "queries.txt").read_text(encoding="utf-8").splitlines()
        texts, pictures = [], []
        for number, query in enumerate(queries):
            start = time.perf_counter()
            hits = searcher.search(f"{query} number {number}")
            texts.append(time.perf_counter() - start)
            start = time.perf_counter()
            searcher.search(image=hits[0].path)
            pictures.append(time.perf_counter() - start)
        pictures = pictures[1:]  # the first one compiles the image tower
    rows = [
        {"what": "open the index, load the model, first query", "ms": round(first * 1e3, 1)},
        *(
            {
                "what": what,
                "ms": round(statistics.median(values) * 1e3, 1),
                "slowest_ms": round(max(values) * 1e3, 1),
                "queries": len(values),
            }
            for what, values in (("text query", texts), ("picture query", pictures))
        ),
    ]
    for row in rows:
        print(row)
    print(write_rows("query_speed", rows))


if __name__ == "__main__":
    main()
