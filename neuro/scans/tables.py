"""Tables that people keep beside scans: comma, semicolon, tab, bar or spaces between columns.

What separates the columns is told by the header: it is what makes most of its names known ones.

>>> names("Age at scan (months)"), names("participant-ID")
('age_at_scan_months', 'participant_id')
"""

from __future__ import annotations

import codecs
import csv
import io
import re
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

__all__ = ["Row", "ScanError", "Table", "decode", "names", "read_table"]

Row = dict[str, str]

_MAX_TABLE_BYTES = 64 * 2**20
_SEPARATORS = "\t,;|"


class ScanError(ValueError):
    """No scans are found, or a list cannot be read; one line with what to do."""


@dataclass(frozen=True)
class Table:
    """What a table says.

    Attributes:
        columns: its header, as it is written.
        rows: column -> cell, "" where a row is shorter than the header.
    """

    columns: tuple[str, ...]
    rows: tuple[Row, ...]


def names(column: str) -> str:
    """A column's name in lower case, with one "_" for all that is no letter and no digit."""
    return re.sub(r"[\W_]+", "_", column.lower()).strip("_")


def read_table(path: Path, is_known: Callable[[str], bool]) -> Table:
    """Read it.

    Args:
        path: the table.
        is_known: whether a column, by its `names`, is one that is looked for.

    Raises:
        ScanError: it cannot be read, or its rows are not separated as its header is.
    """
    what = f"the list {str(path)!r}"
    try:
        if path.stat().st_size > _MAX_TABLE_BYTES:
            raise ScanError(f"{what} is larger than 64 MB; split it")
        text = decode(path)
    except UnicodeDecodeError:
        raise ScanError(f"{what} is not UTF-8 text; save it as such") from None
    except OSError as error:
        raise ScanError(f"{str(path)!r} cannot be read: {error.strerror}") from None
    text = text.replace("\r\n", "\n").replace("\r", "\n").lstrip("\n")
    # A spreadsheet may say first what separates the columns.
    text = re.sub(r'\A"?sep=.?"?\n', "", text, flags=re.IGNORECASE)
    try:
        lines = _split(text, is_known)
    except csv.Error as error:
        raise ScanError(f"{what} cannot be read: {error}") from None
    header, *found = lines or [[]]
    columns = tuple(header)
    if len(columns) > 1 and found and all(not any(row[1:]) for row in found):
        raise ScanError(
            f"{what} has rows that are not separated as its header is "
            f"({', '.join(columns[:10])}); separate all columns by tabs"
        )
    rows = tuple(
        dict(zip(columns, [*row, *[""] * len(columns)][: len(columns)], strict=True))
        for row in found
    )
    return Table(columns, rows)


def decode(path: Path) -> str:
    """A file's text in UTF-8, else in Latin-1, in which what is read here means the same.

    Raises:
        UnicodeDecodeError: it is no text.
        OSError: it cannot be read.
    """
    content = path.read_bytes()
    binary = b"\0" in content or content.startswith((codecs.BOM_UTF16_LE, codecs.BOM_UTF16_BE))
    try:
        return content.decode("utf-8-sig")
    except UnicodeDecodeError:
        if binary:
            raise
        return content.decode("latin-1")


def _split(text: str, is_known: Callable[[str], bool]) -> list[list[str]]:
    """Cells of the lines that hold any, the header first."""

    def lines(source: str, separator: str) -> list[list[str]]:
        read = csv.reader(
            io.StringIO(source), delimiter=separator, skipinitialspace=separator == " "
        )
        return [[cell.strip() for cell in line] for line in read if any(map(str.strip, line))]

    header = text.partition("\n")[0]

    def known(separator: str) -> int:
        first = lines(header, separator)
        return sum(is_known(names(name)) for name in (first[0] if first else ()))

    best = max(_SEPARATORS, key=lambda each: (known(each), header.count(each)))
    spaced = text.replace("\t", " ")
    if known(best) or best in header or not len(header.split()) > 1:
        return lines(text, best)
    # Columns between spaces, any number of them; cells that hold some would shift the others.
    rows = [[cell for cell in line if cell] for line in lines(spaced, " ")]
    for number, row in enumerate(rows):
        if len(row) != len(rows[0]):
            raise csv.Error(
                f"its columns are separated by spaces, and line {number + 1} has {len(row)} of "
                f"{len(rows[0])}; separate them by tabs"
            )
    return rows
