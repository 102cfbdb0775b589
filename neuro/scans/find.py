"""Which scans to work on: files, folders, BIDS data sets and lists, with the ages that they know.

>>> find_scans(["scan.nii.gz", "study/", "list.csv"])                 # doctest: +SKIP
[Scan(path=PosixPath('scan.nii.gz'), name='scan', participant_id='scan', age=None, ...), ...]
"""

from __future__ import annotations

import csv
import os
import re
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

from neuro.scans.read import is_volume_name

__all__ = ["Scan", "ScanError", "find_scans", "parse_age"]

_FILE_COLUMNS = ("file", "path", "filename", "file_name", "image", "scan", "t1w", "t1")
_ID_COLUMNS = ("participant_id", "participant", "subject_id", "subject", "id")
_AGE_COLUMNS = ("age", "age_at_scan", "age_years")
_MAX_TABLE_BYTES = 64 * 2**20
# Left out below a BIDS root: what others made of the scans.
_NOT_RAW = {"derivatives", "sourcedata", "code", "stimuli"}
_UNKNOWN = {"", "n/a", "na", "nan", "none", "null", "-", "?"}


class ScanError(ValueError):
    """No scans are found, or a list cannot be read; one line with what to do."""


@dataclass(frozen=True)
class Scan:
    """One scan.

    Attributes:
        path: its file.
        name: unique within a run, made of letters, digits and ``._-``; names what is written.
        participant_id: whose scan it is, as the data set calls this person.
        age: years at the scan, None if not known.
        note: what is odd about its entry in a table.
    """

    path: Path
    name: str
    participant_id: str
    age: float | None = None
    note: str = ""


def find_scans(inputs: Sequence[str | os.PathLike[str]]) -> list[Scan]:
    """All scans of the given files, folders, BIDS roots and lists, in a fixed order.

    A list is a `.csv` or `.tsv` file with a column `file` and, if known, `participant_id` and
    `age`; its paths are relative to it. Ages of other scans come from a `participants.tsv` in the
    folder of the scan or up to three folders above it.

    Raises:
        ScanError: nothing there, no scans in a folder, or a list that cannot be read.
    """
    found: list[Scan] = []
    seen: set[str] = set()
    tables = _Tables()
    for given in inputs:
        for scan in _scans_of(Path(given), tables):
            key = os.path.abspath(scan.path)
            if key not in seen:
                seen.add(key)
                found.append(scan)
    return _named(found)


def parse_age(text: str | None) -> tuple[float | None, str]:
    """Age in years of a table's cell, and what is odd about it.

    >>> parse_age("63.4"), parse_age("n/a"), parse_age("743")
    ((63.4, ''), (None, ''), (None, "age '743' is no number of years from 0 to 120, left out"))
    """
    text = (text or "").strip()
    if text.lower() in _UNKNOWN:
        return None, ""
    try:
        age = float(text.replace(",", "."))
    except ValueError:
        age = -1.0
    if not 0 <= age <= 120:
        return None, f"age {text[:20]!r} is no number of years from 0 to 120, left out"
    return age, ""


def _scans_of(path: Path, tables: _Tables) -> Iterator[Scan]:
    if path.is_dir():
        yield from _folder(path, tables)
    elif path.suffix.lower() in {".csv", ".tsv"}:
        yield from _list(path)
    elif path.exists():
        yield tables.scan(path, path.parent)
    else:
        raise ScanError(f"there is no file or folder {str(path)!r}; check the path")


def _folder(root: Path, tables: _Tables) -> Iterator[Scan]:
    bids = (root / "dataset_description.json").is_file() or any(
        entry.name.startswith("sub-") and entry.is_dir() for entry in os.scandir(root)
    )
    count = 0
    for path in _files(root, bids):
        count += 1
        yield tables.scan(path, root)
    if not count:
        what = "no sub-*/.../anat/*_T1w.nii.gz" if bids else "no .nii, .nii.gz, .mgz or .img files"
        raise ScanError(f"the folder {str(root)!r} holds {what}; give another folder, or files")


def _files(root: Path, bids: bool) -> Iterator[Path]:
    for folder, folders, files in os.walk(root):
        folders[:] = sorted(
            name for name in folders if not name.startswith(".") and not (bids and name in _NOT_RAW)
        )
        for name in sorted(files):
            if name.startswith(".") or not is_volume_name(name):
                continue
            if bids and not (os.path.basename(folder) == "anat" and _stem(name).endswith("_T1w")):
                continue
            yield Path(folder) / name


def _list(path: Path) -> Iterator[Scan]:
    rows = _read_table(path)
    columns = {name.strip().lower(): name for name in (rows[0] if rows else {})}
    file_column = _column(columns, _FILE_COLUMNS)
    if file_column is None:
        raise ScanError(
            f"the list {str(path)!r} has no column 'file' (it has: "
            f"{', '.join(list(columns)[:10]) or 'nothing'}); name one so"
        )
    id_column, age_column = _column(columns, _ID_COLUMNS), _column(columns, _AGE_COLUMNS)
    for row in rows:
        given = (row[file_column] or "").strip()
        if not given:
            continue
        age, note = parse_age(row[age_column] if age_column else None)
        person = (row[id_column] or "").strip() if id_column else ""
        file = path.parent / Path(given).expanduser()
        yield Scan(file, person, person or _person(file), age, note)


def _column(columns: dict[str, str], names: Sequence[str]) -> str | None:
    return next((columns[name] for name in names if name in columns), None)


def _read_table(path: Path) -> list[dict[str, str | None]]:
    try:
        if path.stat().st_size > _MAX_TABLE_BYTES:
            raise ScanError(f"the list {str(path)!r} is larger than 64 MB; split it")
        text = path.read_text(encoding="utf-8-sig")
    except UnicodeDecodeError:
        raise ScanError(f"the list {str(path)!r} is not UTF-8 text; save it as such") from None
    except OSError as error:
        raise ScanError(f"{str(path)!r} cannot be read: {error.strerror}") from None
    header = text.partition("\n")[0]
    delimiter = max("\t,;", key=header.count)
    try:
        return list(csv.DictReader(text.splitlines(), delimiter=delimiter))
    except csv.Error as error:
        raise ScanError(f"the list {str(path)!r} cannot be read: {error}") from None


class _Tables:
    """participants.tsv files, each read once."""

    def __init__(self) -> None:
        self._read: dict[Path, dict[str, tuple[float | None, str]]] = {}

    def scan(self, path: Path, root: Path) -> Scan:
        ages = self._near(path)
        person = _person(path)
        if person not in ages:
            # Where files are called IXI013-HH-1212_T1w and people IXI013-HH-1212.
            stem = _stem(path.name)
            longer = [p for p in ages if re.match(re.escape(p) + r"(?![A-Za-z0-9])", stem)]
            person = max(longer, key=len, default=person)
        age, note = ages.get(person, (None, ""))
        return Scan(path, "", person, age, note)

    def _near(self, path: Path) -> dict[str, tuple[float | None, str]]:
        folder = Path(os.path.abspath(path)).parent
        for place in (folder, *folder.parents[:3]):
            table = place / "participants.tsv"
            if table not in self._read and table.is_file():
                self._read[table] = self._ages(table)
            if table in self._read:
                return self._read[table]
        return {}

    @staticmethod
    def _ages(table: Path) -> dict[str, tuple[float | None, str]]:
        rows = _read_table(table)
        columns = {name.strip().lower(): name for name in (rows[0] if rows else {}) if name}
        people, years = _column(columns, _ID_COLUMNS), _column(columns, _AGE_COLUMNS)
        if people is None:
            return {}
        return {
            (row[people] or "").strip(): parse_age(row[years] if years else None) for row in rows
        }


# --- names -------------------------------------------------------------------------------------


def _stem(name: str) -> str:
    """A file's name without what says that it is a volume."""
    for suffix in (".gz", ".nii", ".mgz", ".mgh", ".img", ".hdr"):
        if name.lower().endswith(suffix):
            name = name[: -len(suffix)]
    return name


def _person(path: Path) -> str:
    """The participant as BIDS writes it into names, else the file's name."""
    for part in (path.name, *reversed(path.parent.parts)):
        match = re.match(r"sub-[A-Za-z0-9]+", part)
        if match:
            return match[0]
    return _base(path)


def _base(path: Path) -> str:
    return _stem(path.name).removesuffix("_T1w") or path.name


def _named(scans: list[Scan]) -> list[Scan]:
    """Give each scan a name of its own: the shortest end of its path that no other one has."""
    wanted = [scan.name or _base(scan.path) for scan in scans]
    for depth in range(1, 5):
        often = Counter(name.lower() for name in wanted)
        for i, scan in enumerate(scans):
            if often[wanted[i].lower()] > 1:
                above = scan.path.parts[-1 - depth : -1]
                wanted[i] = "_".join((*above, _base(scan.path)))
    named, taken = [], set()
    for scan, name in zip(scans, wanted, strict=True):
        safe = re.sub(r"[^A-Za-z0-9._-]+", "-", name).strip("-.")[:100] or "scan"
        unique, number = safe, 1
        while unique.lower() in taken:
            number += 1
            unique = f"{safe}-{number}"
        taken.add(unique.lower())
        named.append(replace(scan, name=unique))
    return named
