"""Ages that tables know: lists, participants.tsv and sessions.tsv, with the units beside them.

An age is optional, and a wrong one is worse than none: what is contradictory, of an unknown unit or
of another session is left out with a note, and a table that cannot be read stops nothing.

>>> table = AgeTable(Path("bids/participants.tsv"))                   # doctest: +SKIP
>>> table.age_of("sub-01", "ses-2")                                   # doctest: +SKIP
(73.0, '')
"""

from __future__ import annotations

import codecs
import csv
import io
import json
import re
from collections import defaultdict
from collections.abc import Sequence
from pathlib import Path
from typing import Any

__all__ = [
    "AGE_COLUMNS",
    "FILE_COLUMNS",
    "ID_COLUMNS",
    "AgeTable",
    "ScanError",
    "agreed",
    "parse_age",
]

FILE_COLUMNS = ("file", "path", "filename", "file_name", "image", "scan", "t1w", "t1")
ID_COLUMNS = ("participant_id", "participant", "subject_id", "subject", "id")
AGE_COLUMNS = ("age", "age_at_scan", "age_years")
_SESSION_COLUMNS = ("session_id", "session", "ses")
_MAX_TABLE_BYTES = 64 * 2**20
_UNKNOWN = {"", "n/a", "na", "nan", "none", "null", "-", "?"}
_DAY = 1 / 365.25
# Years that a unit is, by its names in BIDS data sets and in UCUM.
_YEARS = {
    **dict.fromkeys(("year", "years", "yr", "yrs", "y", "a"), 1.0),
    **dict.fromkeys(("month", "months", "mo", "mos", "mon"), 1 / 12),
    **dict.fromkeys(("week", "weeks", "wk", "wks", "w"), 7 * _DAY),
    **dict.fromkeys(("day", "days", "d"), _DAY),
}


class ScanError(ValueError):
    """No scans are found, or a list cannot be read; one line with what to do."""


def parse_age(text: str | None, unit: float = 1.0) -> tuple[float | None, str]:
    """Age in years of a table's cell, and what is odd about it.

    Args:
        text: the cell.
        unit: years that a 1 in the cell stands for.

    >>> parse_age("63.4"), parse_age("n/a"), parse_age("743")
    ((63.4, ''), (None, ''), (None, "age '743' is no number of years from 0 to 120, left out"))
    >>> parse_age("96", unit=1 / 12)
    (8.0, '')
    """
    text = (text or "").strip()
    if text.lower() in _UNKNOWN:
        return None, ""
    try:
        age = float(text.replace(",", "."))
    except ValueError:
        age = -1.0
    if unit != 1:
        age = round(age * unit, 4)
    if not 0 <= age <= 120:
        return None, f"age {text[:20]!r} is no number of years from 0 to 120, left out"
    return age, ""


class AgeTable:
    """A table of people, sessions or files, as `.csv` or `.tsv`."""

    def __init__(self, path: Path, sidecars: Sequence[Path] = (), person: str = "") -> None:
        """Read it.

        Args:
            path: the table.
            sidecars: JSON files that may tell the unit of its ages, the nearest first, besides the
                one of its own name.
            person: whom its rows are about if no column says so.

        Raises:
            ScanError: it cannot be read.
        """
        self.path = path
        self.rows = _read(path)
        header = self.rows[0] if self.rows else {}
        self.columns = {name.strip().lower(): name for name in header if name}
        self._unit, self._odd = 1.0, ""
        if age := self._column(AGE_COLUMNS):
            self._unit, self._odd = _unit(age, (path.with_suffix(".json"), *sidecars))
        # By the id without its prefix, rows in their order; the ids as they are written.
        self._people: dict[str, list[dict[str, str | None]]] = defaultdict(list)
        self.ids: list[str] = []
        for row in self.rows:
            if name := self.cell(row, ID_COLUMNS) or person:
                self.ids.append(name)
                self._people[_label(name)].append(row)
        self._loose: dict[str, list[dict[str, str | None]]] = defaultdict(list)
        for label, rows in self._people.items():
            self._loose[_loose(label)] += rows

    def has(self, names: Sequence[str]) -> bool:
        """Whether it has a column of one of these names."""
        return self._column(names) is not None

    def cell(self, row: dict[str, str | None], names: Sequence[str]) -> str:
        """What a row says in the first column of these names; "" if nothing."""
        column = self._column(names)
        return (row[column] or "").strip() if column else ""

    def age(self, row: dict[str, str | None]) -> tuple[float | None, str]:
        """Years that a row says, and what is odd about it."""
        age, note = parse_age(self.cell(row, AGE_COLUMNS), self._unit)
        return (None, self._odd) if self._odd and age is not None else (age, note)

    def age_of(self, person: str, session: str) -> tuple[float | None, str] | None:
        """Years of a person, with "sub-" or without, at a session.

        Args:
            person: such as "sub-01"; a number is found without its leading zeros too.
            session: such as "ses-1"; "" if the scan has none.

        Returns:
            None if the person is not in the table; else the age and what is odd about it.
        """
        label = _label(person)
        rows = self._people.get(label) or self._loose.get(_loose(label))
        if not rows:
            return None
        if session and self.has(_SESSION_COLUMNS):
            label = _label(session)
            said = [_label(self.cell(row, _SESSION_COLUMNS)) for row in rows]
            for same in (
                [name == label for name in said],
                [_loose(name) == _loose(label) for name in said],
                [name.lower() in _UNKNOWN for name in said],
            ):
                if any(same):
                    rows = [row for row, is_same in zip(rows, same, strict=True) if is_same]
                    break
            else:
                return None, f"{self.path.name} has no row of {person} for {session}; no age"
        return agreed([self.age(row) for row in rows], f"{self.path.name} says of {person}")

    def _column(self, names: Sequence[str]) -> str | None:
        return next((self.columns[name] for name in names if name in self.columns), None)


def agreed(ages: Sequence[tuple[float | None, str]], who: str) -> tuple[float | None, str]:
    """The one age that several entries give, if they do not contradict each other."""
    known = sorted({age for age, _ in ages if age is not None})
    if len(known) > 1:
        return None, f"{who} the ages {', '.join(f'{age:g}' for age in known)}, left out"
    notes = dict.fromkeys(note for _, note in ages if note)
    return (known[0] if known else None), " ".join(notes)


def _label(name: str) -> str:
    """A BIDS label without what it is a label of."""
    return re.sub(r"^(sub|ses)-", "", name.strip(), flags=re.IGNORECASE)


def _loose(label: str) -> str:
    """The same for numbers that a spreadsheet has cut the zeros of."""
    return label.lstrip("0") if label.isdigit() else label


def _read(path: Path) -> list[dict[str, str | None]]:
    try:
        if path.stat().st_size > _MAX_TABLE_BYTES:
            raise ScanError(f"the list {str(path)!r} is larger than 64 MB; split it")
        text = _text(path)
    except UnicodeDecodeError:
        raise ScanError(f"the list {str(path)!r} is not UTF-8 text; save it as such") from None
    except OSError as error:
        raise ScanError(f"{str(path)!r} cannot be read: {error.strerror}") from None
    header = text.partition("\n")[0]
    delimiter = max("\t,;", key=header.count)
    try:
        return list(csv.DictReader(io.StringIO(text, newline=None), delimiter=delimiter))
    except csv.Error as error:
        raise ScanError(f"the list {str(path)!r} cannot be read: {error}") from None


def _text(path: Path) -> str:
    """A file's text in UTF-8, else in Latin-1, in which what is read here means the same."""
    content = path.read_bytes()
    binary = b"\0" in content or content.startswith((codecs.BOM_UTF16_LE, codecs.BOM_UTF16_BE))
    try:
        return content.decode("utf-8-sig")
    except UnicodeDecodeError:
        if binary:
            raise
        return content.decode("latin-1")


def _lower(said: object) -> dict[str, Any]:
    """A JSON object by its names in lower case; empty if it is none."""
    return {name.lower(): text for name, text in said.items()} if isinstance(said, dict) else {}


def _unit(column: str, sidecars: Sequence[Path]) -> tuple[float, str]:
    """Years that the unit of a column is, and why that cannot be told."""
    for path in sidecars:
        if not path.is_file():
            continue
        try:
            columns = json.loads(_text(path))
        except (OSError, ValueError, RecursionError):
            return 1.0, f"{path.name} cannot be read, so the unit of {column} is unknown; no age"
        said = _lower(_lower(columns).get(column.strip().lower()))
        unit = said.get("units", said.get("unit"))
        if unit is not None and str(unit).strip().lower() not in _UNKNOWN:
            if (years := _YEARS.get(str(unit).strip().lower())) is not None:
                return years, ""
            return 1.0, (
                f"{path.name} gives {column} in {str(unit)[:40]!r}; valid Units are years, months, "
                "weeks and days; no age"
            )
        words = set(re.findall("[a-z]+", str(said.get("description", "")).lower()))
        if words & {"month", "months", "weeks", "days"} and not words & {"year", "years"}:
            return 1.0, (
                f"{path.name} describes {column} in other words than years; say so in Units; no age"
            )
    return 1.0, ""
