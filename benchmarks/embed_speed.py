"""Speed from JPEG file to vector, and whether the fast runtime gives torch's vectors.

    python benchmarks/embed_speed.py                 # ENN_DATA's Flickr8k photos, 224 px
    python benchmarks/embed_speed.py --images DIR    # your own photos

Each row is one runtime: files are read, decoded (with JPEG draft) and resized in threads while the
tower runs, as when indexing. Runtimes take turns, the best of three rounds counts. CPU time per
image stands beside the rate: on a busy machine only that says something. Appends to
`benchmarks/results/embed_speed.csv`.
"""

from __future__ import annotations

import argparse
import os
import sys
import time
from collections.abc import Callable
from pathlib import Path

import numpy as np
from record import write_rows

import retrieval.model.loading
from retrieval.eval.recall import embed_images
from retrieval.images import decode, find_images
from retrieval.model.runtime import available_runtimes


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    data = Path(os.environ.get("ENN_DATA", "../shared/data"))
    parser.add_argument("--images", type=Path, default=data / "flickr8k" / "images")
    parser.add_argument("--model", default=retrieval.model.loading.MINI)
    parser.add_argument("--count", type=int, default=1000, help="photos (default: %(default)s)")
    parser.add_argument("--batch-size", type=int, default=32)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--runtimes", nargs="+", default=available_runtimes())
    arguments = parser.parse_args()
    paths = list(find_images(arguments.images, on_error=lambda path, reason: None))
    paths = paths[: arguments.count]
    if not paths:
        sys.exit(f"no images in {arguments.images}; set ENN_DATA or give --images DIR")

    models = {
        name: retrieval.model.loading.load(arguments.model, runtime=name)
        for name in arguments.runtimes
    }
    preprocess = next(iter(models.values())).preprocess
    warm = np.stack([pixels(path, preprocess) for path in paths[: arguments.batch_size]])
    for model in models.values():
        model.image_vectors(warm)  # compile outside the clock

    reference = models["torch"].image_vectors(warm) if "torch" in models else None
    best: dict[str, tuple[float, float]] = {}
    tower: dict[str, float] = {}
    decoding = min(
        clock(lambda: [pixels(path, preprocess) for path in paths[:200]])[1] / min(200, len(paths))
        for _ in range(arguments.rounds)
    )
    for _ in range(arguments.rounds):
        for name, model in models.items():
            few = paths if name != "torch" else paths[: max(100, len(paths) // 4)]
            wall, cpu = clock(
                lambda model=model, few=few: embed_images(
                    model, few, batch_size=arguments.batch_size
                )
            )
            rate = (len(few) / wall, cpu / len(few))
            best[name] = max(best.get(name, (0.0, 0.0)), rate)
            wall, _ = clock(lambda model=model: model.image_vectors(warm))
            tower[name] = max(tower.get(name, 0.0), len(warm) / wall)

    rows = []
    for name, model in models.items():
        difference = ""
        if reference is not None and name != "torch":
            difference = f"{np.abs(model.image_vectors(warm) - reference).max():.1e}"
        rows.append(
            {
                "model": model.name,
                "weights": model.weights_hash[:12],
                "runtime": name,
                "images_per_s": round(best[name][0], 1),
                "cpu_ms_per_image": round(1000 * best[name][1], 2),
                "tower_only_images_per_s": round(tower[name], 1),
                "decode_cpu_ms_per_image": round(1000 * decoding, 2),
                "largest_difference_from_torch": difference,
                "images": len(paths),
                "batch_size": arguments.batch_size,
            }
        )
    for row in rows:
        print({key: row[key] for key in list(row)[2:8]})
    print(write_rows("embed_speed", rows))


def pixels(path: Path, preprocess: retrieval.model.loading.Preprocess) -> np.ndarray:
    return preprocess(decode(path, draft_size=preprocess.draft_size))


def clock(work: Callable[[], object]) -> tuple[float, float]:
    """(wall, CPU) seconds of all threads of this process."""
    wall, cpu = time.perf_counter(), time.process_time()
    work()
    return time.perf_counter() - wall, time.process_time() - cpu


if __name__ == "__main__":
    main()
