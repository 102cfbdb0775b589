"""How many of a query's ten best images an ANN proposes, on real vectors and real texts.

    python benchmarks/ann_recall.py      # ENN_DATA's Flickr8k, about 5 minutes on 2 quiet cores

Compares inverted lists with what the index uses (4-bit codes of coordinate pairs, all scanned) for
captions and for images as queries. Proposals are 1 % of the images. Writes
`benchmarks/results/ann_recall.csv`.
"""

from __future__ import annotations

import argparse
import json
import os
import sys
import time
from pathlib import Path
from typing import Any

import faiss
import numpy as np
from record import write_rows

import retrieval.model.loading
from retrieval.eval.recall import embed_images

QUERIES = 600


def proposals(index: Any, queries: np.ndarray, count: int, probes: int | None) -> tuple:
    """Labels (M, count) and CPU milliseconds per query."""
    options = {}
    if probes is not None:
        options["params"] = faiss.SearchParametersIVF(nprobe=probes)
    started = time.process_time()
    labels = np.concatenate([index.search(q[None], count, **options)[1] for q in queries])
    return labels, 1000 * (time.process_time() - started) / len(queries)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    data = Path(os.environ.get("ENN_DATA", "../shared/data")) / "flickr8k"
    parser.add_argument("--images", type=Path, default=data / "images")
    parser.add_argument("--captions", type=Path, default=data / "dataset_flickr8k.json")
    parser.add_argument("--model", default=retrieval.model.loading.MINI)
    parser.add_argument("--count", type=int, default=5000, help="images (default: %(default)s)")
    arguments = parser.parse_args()
    if not arguments.captions.exists():
        sys.exit(f"no {arguments.captions}; set ENN_DATA or give --images and --captions")
    listed = json.loads(arguments.captions.read_text("utf-8"))["images"][: arguments.count]
    model = retrieval.model.loading.load(arguments.model)
    images = embed_images(model, [arguments.images / item["filename"] for item in listed])
    images = np.ascontiguousarray(images, np.float32)
    texts = model.text_vectors([item["sentences"][0]["raw"] for item in listed[:QUERIES]])
    rows = []
    dim, count = images.shape[1], len(images) // 100
    lists = 2 ** round(np.log2(np.sqrt(len(images))))
    kinds = [(f"PQ{dim // 2}x4fs", None), ("SQ8", None)]
    kinds += [(f"IVF{lists},SQ8", lists // share) for share in (32, 8, 4)]
    for kind, probes in kinds:
        index = faiss.index_factory(dim, kind, faiss.METRIC_INNER_PRODUCT)
        index.train(images)
        index.add(images)
        for name, queries in (("text", texts), ("image", images[:QUERIES])):
            queries = np.ascontiguousarray(queries, np.float32)
            found, cpu = proposals(index, queries, count, probes)
            best = np.argpartition(-(queries @ images.T), 9, axis=1)[:, :10]
            hits = [len({*a} & {*b}) for a, b in zip(found.tolist(), best.tolist(), strict=True)]
            row = {
                "index": kind,
                "share of lists": "" if probes is None else probes / lists,
                "queries": name,
                "images": len(images),
                "candidates": count,
                "recall@10 of candidates": round(sum(hits) / (10 * len(queries)), 4),
                "cpu_ms": round(cpu, 3),
            }
            print(row, flush=True)
            rows.append(row)
    print(write_rows("ann_recall", rows))


if __name__ == "__main__":
    main()
