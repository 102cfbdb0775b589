"""Ages that tables know: lists, participants.tsv and sessions.tsv, with the units beside them.

An age is optional, and a wrong one is worse than none: what is contradictory, of an unknown unit or
of another session is left out with a note, and a table that cannot be read stops nothing.

>>> table = AgeTable(Path("bids/participants.tsv"))                   # doctest: +SKIP
>>> table.age_of("sub-01", "ses-2")                                   # doctest: +SKIP
(73.0, '')
"""

from __future__ import annotations

import json
import re
from collections import defaultdict
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from neuro.scans.tables import Row, ScanError, decode, names, read_table

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
_UNKNOWN = {"", "n/a", "na", "nan", "none", "null", "-", "?"}
# Words of a column's name that leave it the age at the scan ("onset", "group" or "birth" do not).
_AGE_WORDS = {*("age", "ages", "at", "in", "of", "the", "scan", "scanning", "mri", "mr", "subject")}
_DAY = 1 / 365.25
# Years that a unit is, by its names in BIDS data sets and in UCUM.
_YEARS = {
    **dict.fromkeys(("year", "years", "yr", "yrs", "y", "a"), 1.0),
    **dict.fromkeys(("month", "months", "mo", "mos", "mon"), 1 / 12),
    **dict.fromkeys(("week", "weeks", "wk", "wks", "w"), 7 * _DAY),
    **dict.fromkeys(("day", "days", "d"), _DAY),
}


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
        table = read_table(path, _is_known)
        self.rows = table.rows
        self.columns = {names(name): name for name in table.columns if name}
        beside = (path.with_suffix(".json"), *sidecars)
        # Columns that tell the age, "age" first; the years that their unit is, or why it is not
        # known.
        self._ages = [
            (name, *_unit(name, beside, _named_unit(key)))
            for key, name in sorted(self.columns.items(), key=lambda each: _rank(each[0]))
            if _named_unit(key) is not None
        ]
        self._odd = "" if self._ages else self._like_ages()
        # By the id without its prefix, rows in their order; the ids as they are written.
        self._people: dict[str, list[Row]] = defaultdict(list)
        self.ids: list[str] = []
        for row in self.rows:
            if name := self.cell(row, ID_COLUMNS) or person:
                self.ids.append(name)
                self._people[_label(name)].append(row)
        self._loose: dict[str, list[Row]] = defaultdict(list)
        for label, rows in self._people.items():
            self._loose[_loose(label)] += rows

    @property
    def has_ages(self) -> bool:
        """Whether a column tells ages."""
        return bool(self._ages)

    @property
    def knows_ages(self) -> bool:
        """Whether a row has something in such a column."""
        return any(
            row[column].lower() not in _UNKNOWN for row in self.rows for column, _, _ in self._ages
        )

    def has(self, columns: Sequence[str]) -> bool:
        """Whether it has a column of one of these names."""
        return self._column(columns) is not None

    def cell(self, row: Row, columns: Sequence[str]) -> str:
        """What a row says in the first column of these names; "" if nothing."""
        column = self._column(columns)
        return row[column] if column else ""

    def age(self, row: Row) -> tuple[float | None, str]:
        """Years that a row says, and what is odd about it."""
        said = []
        for column, unit, odd in self._ages:
            age, note = parse_age(row[column], unit)
            told = row[column].lower() not in _UNKNOWN
            said.append((None, odd) if odd and told else (age, note))
        known = [age for age, _ in said if age is not None]
        if known and max(known) - min(known) > 1:
            columns = ", ".join(column for column, _, _ in self._ages)
            return None, f"{self.path.name} has ages in {columns} that differ, left out"
        notes = [note for _, note in said if note]
        return (known[0], "") if known else (None, (*notes, self._odd)[0])

    def age_of(self, person: str, session: str) -> tuple[float | None, str] | None:
        """Years of a person, with "sub-" or without, at a session.

        Args:
            person: such as "sub-01"; a number is found without its leading zeros too.
            session: such as "ses-1"; "" if the scan has none.

        Returns:
            None if the person is not in the table; else the age and what is odd about it.
        """
        if self.rows and not self.ids:
            there = ", ".join(list(self.columns.values())[:10]) or "nothing"
            return None, (
                f"{self.path.name} has no column participant_id that says whose its rows are (it "
                f"has: {there}); no age"
            )
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

    def _like_ages(self) -> str:
        """Why a table has no ages, if it seems to have some; "" if it does not."""
        like = [name for key, name in self.columns.items() if re.search(r"(^|_)age|birth", key)]
        if like:
            return (
                f"{self.path.name} has no column that is known to be the age at the scan (it has: "
                f"{', '.join(like[:5])}); call it age, or age_months; no age"
            )
        return ""

    def _column(self, columns: Sequence[str]) -> str | None:
        return next((self.columns[name] for name in columns if name in self.columns), None)


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


def _lower(said: object) -> dict[str, Any]:
    """A JSON object by its names in lower case; empty if it is none."""
    return {name.lower(): text for name, text in said.items()} if isinstance(said, dict) else {}


def _named_unit(column: str) -> float | None:
    """Years that a 1 in a column of this name is; 0 if it does not say; None if it tells no age."""
    words = re.sub(r"^age(?=[a-z])", "age_", column).split("_")
    others = [word for word in words if word not in _AGE_WORDS]
    if "age" not in words or len(others) > 1 or not set(others) <= _YEARS.keys():
        return None
    return _YEARS[others[0]] if others else 0.0


def _rank(column: str) -> tuple[int, str]:
    return (AGE_COLUMNS.index(column) if column in AGE_COLUMNS else len(AGE_COLUMNS), column)


def _is_known(column: str) -> bool:
    known = (*FILE_COLUMNS, *ID_COLUMNS, *_SESSION_COLUMNS)
    return column in known or _named_unit(column) is not None


def _unit(column: str, sidecars: Sequence[Path], named: float | None) -> tuple[float, str]:
    """Years that the unit of a column is, and why that cannot be told.

    Args:
        column: its name.
        sidecars: JSON files that may say.
        named: years of the unit in its name, if there is one.
    """
    for path in sidecars:
        if not path.is_file():
            continue
        try:
            columns = json.loads(decode(path))
        except (OSError, ValueError, RecursionError):
            return 1.0, f"{path.name} cannot be read, so the unit of {column} is unknown; no age"
        said = _lower(_lower(columns).get(column.strip().lower()))
        unit = said.get("units", said.get("unit"))
        if unit is not None and str(unit).strip().lower() not in _UNKNOWN:
            if (years := _YEARS.get(str(unit).strip().lower())) is not None:
                if named and years != named:
                    return 1.0, f"{path.name} gives {column} another unit than its name; no age"
                return years, ""
            return 1.0, (
                f"{path.name} gives {column} in {str(unit)[:40]!r}; valid Units are years, months, "
                "weeks and days; no age"
            )
        if named:
            break
        words = set(re.findall("[a-z]+", str(said.get("description", "")).lower()))
        if words & {"month", "months", "weeks", "days"} and not words & {"year", "years"}:
            return 1.0, (
                f"{path.name} describes {column} in other words than years; say so in Units; no age"
            )
    return named or 1.0, ""
