"""Tables as CSV files."""

from __future__ import annotations

import csv
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

from enn_core.files.atomic import replacing

__all__ = ["write_table"]


def write_table(
    rows: Iterable[Mapping[str, Any]], file: Path, columns: Sequence[str] | None = None
) -> None:
    """Write rows as CSV, complete or not at all; what a row lacks is left empty.

    Args:
        rows: column -> value.
        file: replaced if it is there.
        columns: in their order; all that any row has, in order of appearance, by default.

    Raises:
        OSError: if the file cannot be written.
        ValueError: if a row has other columns.
    """
    rows = list(rows)
    names = list(dict.fromkeys(key for row in rows for key in row)) if columns is None else columns
    with replacing(file) as temporary, temporary.open("w", newline="", encoding="utf-8") as out:
        writer = csv.DictWriter(out, names, restval="")
        writer.writeheader()
        writer.writerows(rows)
