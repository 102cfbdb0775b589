"""Flipped bytes in every kind of stored file: what is used without a word, and what stops work.

    python benchmarks/flips.py [--state after] [--kinds "brain cache" ...]

Each try damages one file, then runs the commands that read it and compares their results, all
digits of them, with those of the undamaged file. A row of `benchmarks/results/flips.csv` counts:

- silently_wrong: exit 0 and another result, and no word that names the file
- blocked: an error that does not name the file, or work that stops although the file can be made
  anew from what is there
- named: refused, or done without the damaged part, by a message that names the file
- harmless: the same result

Rows of another state (before the files were checked, after) are kept. The inputs are those of the
tests, `tests/cases/flips.py`.
"""

from __future__ import annotations

import argparse
import csv
import sys
import tempfile
from pathlib import Path
from typing import Any

from record import RESULTS, write_rows

ROOT = Path(__file__).resolve().parents[1]
sys.path[:0] = [str(ROOT / "tests" / "cases")]

from command_server import CommandServer  # noqa: E402
from flip_cases import KINDS, VERDICTS, judge_kind  # noqa: E402
from stored_files import Stored  # noqa: E402


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--state", default="after", help="of the code: before or after checks")
    parser.add_argument("--kinds", nargs="+", default=list(KINDS), choices=KINDS)
    given = parser.parse_args()
    rows: list[dict[str, Any]] = []
    with tempfile.TemporaryDirectory() as folder, CommandServer() as server:
        stored = Stored(Path(folder) / "stored", server)
        for kind in given.kinds:
            tries = KINDS[kind].tries
            found = judge_kind(stored, kind, tries)
            counts = {verdict.replace(" ", "_"): found[verdict] for verdict in VERDICTS}
            rows.append({"state": given.state, "what": kind, "tries": tries, **counts})
            print(rows[-1], flush=True)
    kept = [
        row
        for row in _rows(RESULTS / "flips.csv")
        if (row["state"], row["what"]) not in {(new["state"], new["what"]) for new in rows}
    ]
    print(write_rows("flips", [*kept, *rows]))


def _rows(file: Path) -> list[dict[str, Any]]:
    if not file.exists():
        return []
    with file.open(newline="", encoding="utf-8") as table:
        return list(csv.DictReader(table))


if __name__ == "__main__":
    main()
