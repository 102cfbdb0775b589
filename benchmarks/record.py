"""Where a benchmark's numbers come from, and the CSV files that keep them."""

from __future__ import annotations

import csv
from pathlib import Path
from typing import Any

from enn_core.lab.bench.origin import provenance

__all__ = ["RESULTS", "provenance", "write_rows"]

RESULTS = Path(__file__).parent / "results"


def write_rows(name: str, rows: list[dict[str, Any]]) -> Path:
    """Write rows, each with its provenance, to `results/NAME.csv`, replacing the file.

    Rows of an earlier run, that have theirs, keep it.
    """
    origin = provenance()
    rows = [{**row, **origin, **row} for row in rows]
    columns = list(dict.fromkeys(key for row in rows for key in row))
    RESULTS.mkdir(exist_ok=True)
    path = RESULTS / f"{name}.csv"
    with path.open("w", newline="", encoding="utf-8") as file:
        writer = csv.DictWriter(file, fieldnames=columns, restval="")
        writer.writeheader()
        writer.writerows(rows)
    return path
