"""What comparing vectors with their digests costs: the first query of a process, and later ones.

    python benchmarks/digest_cost.py        # 100,000 vectors of 512 numbers

Each round opens an index twice, once with its digests compared and once with that switched off, in
alternation in one process, and times an exact query: the first, which reads every block, and
later ones. The vectors are synthetic, as those of `index_speed.py`. Times are of the CPU, medians
over the rounds with the least and the most; the pages of the files are in memory. Writes
`benchmarks/results/digest_cost.csv`.
"""

from __future__ import annotations

import argparse
import contextlib
import statistics
import tempfile
import time
from collections import defaultdict
from pathlib import Path
from unittest import mock

import index_speed
import numpy as np
from record import write_rows

from retrieval.index.eigen_index import EigenIndex
from retrieval.index.snapshot import Snapshot

DIM = 512
LATER = 20  # queries


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--count", type=int, default=100_000, help="vectors")
    parser.add_argument("--rounds", type=int, default=9)
    given = parser.parse_args()
    query = np.random.default_rng(1).normal(size=DIM).astype(np.float32)
    times: dict[tuple[str, str], list[float]] = defaultdict(list)
    with tempfile.TemporaryDirectory() as place, mock.patch.object(index_speed, "DIM", DIM):
        folder = Path(place) / "index"
        index_speed.build(folder, given.count)[0].close()
        for round_ in range(given.rounds + 1):
            for state in ("compared", "switched off"):
                off = mock.patch.object(Snapshot, "check", return_value=None)
                with off if state == "switched off" else contextlib.nullcontext():
                    found = _one(folder, query)
                if round_:  # the first warms up
                    for what, value in found.items():
                        times[state, what].append(value)
    rows = [
        {
            "measured": what,
            "digests": state,
            "count": given.count,
            "dim": DIM,
            "cpu_ms": round(1e3 * statistics.median(values), 3),
            "least": round(1e3 * min(values), 3),
            "most": round(1e3 * max(values), 3),
        }
        for (state, what), values in times.items()
    ]
    for row in rows:
        print(row)
    print(write_rows("digest_cost", rows))


def _one(folder: Path, query: np.ndarray) -> dict[str, float]:
    with EigenIndex.open(folder) as index:
        first = _timed(index, query)
        later = [_timed(index, query) for _ in range(LATER)]
    return {"first exact query": first, "later exact query": statistics.median(later)}


def _timed(index: EigenIndex, query: np.ndarray) -> float:
    started = time.process_time()
    index.search(query, 20)
    return time.process_time() - started


if __name__ == "__main__":
    main()
