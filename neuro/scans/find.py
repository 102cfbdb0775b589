"""Which scans to work on: files, folders, BIDS data sets and lists, with the ages that they know.

>>> find_scans(["scan.nii.gz", "study/", "list.csv"])                 # doctest: +SKIP
[Scan(path=PosixPath('scan.nii.gz'), name='scan', participant_id='scan', age=None, ...), ...]
"""

from __future__ import annotations

import os
import re
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

from neuro.scans.ages import (
    FILE_COLUMNS,
    ID_COLUMNS,
    AgeTable,
    ScanError,
    agreed,
    parse_age,
)
from neuro.scans.dicom import DICOM_ADVICE, holds_dicom, is_dicom
from neuro.scans.read import is_volume_name

__all__ = ["Scan", "ScanError", "find_scans", "parse_age"]

# Left out below a BIDS root: what others made of the scans.
_NOT_RAW = {"derivatives", "sourcedata", "code", "stimuli"}
# Volumes of a FreeSurfer subject that show the whole head: as it was scanned, in 1 mm voxels, and
# with its intensities changed.
_FREESURFER_HEADS = ("orig.mgz", "T1.mgz")
# Beside its volumes; surfaces have values in files that are called as volumes are.
_FREESURFER_OTHERS = {"surf", "label", "stats", "scripts", "touch", "tmp", "trash", "src", "xhemi"}
_FREESURFER_MARKS = {*_FREESURFER_HEADS, "brainmask.mgz", "aseg.mgz", "norm.mgz"}


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
    `age`; its paths are relative to it. Ages of other scans come from a `sub-<label>_sessions.tsv`
    or a `participants.tsv` (or `.csv`) in the folder of the scan or up to three folders above it,
    in the units of the `.json` beside it. Of a FreeSurfer subject one volume is taken.

    Raises:
        ScanError: nothing there, no scans in a folder, or a list that cannot be read.
    """
    entries: dict[tuple[str, str], list[Scan]] = {}
    people: dict[str, list[str]] = {}
    tables = _Tables()
    for given in inputs:
        path = Path(given)
        for scan in _scans_of(path, tables):
            # A file counts once, and once for each person that a list gives it to.
            file = os.path.abspath(scan.path)
            who = scan.participant_id if _is_list(path) else ""
            listed = people.setdefault(file, [])
            if who not in listed:
                listed.append(who)
            entries.setdefault((file, who), []).append(scan)
    found = []
    for (file, who), rows in entries.items():
        if not who and any(people[file]):
            # What a list says of it counts, wherever it stands among the inputs.
            continue
        age, note = agreed([(row.age, row.note) for row in rows], f"the list says of {who}")
        if len(listed := [name for name in people[file] if name]) > 1:
            note = f"{note} this file is listed for {', '.join(listed[:5])}".strip()
        found.append(replace(rows[0], age=age, note=note))
    return _named(found)


def _is_list(path: Path) -> bool:
    return path.suffix.lower() in {".csv", ".tsv"} and not path.is_dir()


def _scans_of(path: Path, tables: _Tables) -> Iterator[Scan]:
    if path.is_dir():
        yield from _folder(path, tables)
    elif _is_list(path):
        yield from _list(path)
    elif path.exists():
        yield tables.scan(path)
    else:
        raise ScanError(f"there is no file or folder {str(path)!r}; check the path")


def _folder(root: Path, tables: _Tables) -> Iterator[Scan]:
    bids = (root / "dataset_description.json").is_file() or any(
        entry.name.startswith("sub-") and entry.is_dir() for entry in os.scandir(root)
    )
    paths = list(_files(root, bids))
    # Some archives call each slice .img; a stray one among volumes gets a row that says so.
    if not all(is_dicom(path) for path in paths):
        yield from (replace(tables.scan(path), name=_subject(path)) for path in paths)
        return
    if paths or holds_dicom(root):
        raise ScanError(f"the folder {str(root)!r} holds DICOM files; {DICOM_ADVICE}")
    what = "no sub-*/.../anat/*_T1w.nii.gz" if bids else "no .nii, .nii.gz, .mgz or .img files"
    raise ScanError(f"the folder {str(root)!r} holds {what}; give another folder, or files")


def _files(root: Path, bids: bool) -> Iterator[Path]:
    for folder, folders, files in os.walk(root):
        place = Path(folder)
        left_out = _NOT_RAW if bids else set()
        if _is_freesurfer(place / "mri"):
            left_out = left_out | _FREESURFER_OTHERS
        folders[:] = sorted(
            name
            for name in folders
            if not name.startswith(".")
            and name not in left_out
            # A template, which FreeSurfer puts beside the people.
            and not (name.startswith("fsaverage") and _is_freesurfer(place / name / "mri"))
        )
        if _is_freesurfer(place):
            folders.clear()
            yield next((place / n for n in _FREESURFER_HEADS if n in files), place / "orig.mgz")
            continue
        for name in sorted(files):
            if name.startswith(".") or not is_volume_name(name):
                continue
            if bids and not (place.name == "anat" and _stem(name).endswith("_T1w")):
                continue
            yield place / name


def _is_freesurfer(folder: Path) -> bool:
    """Whether this is the folder `mri` of a FreeSurfer subject: the same head, many times."""
    folder = Path(os.path.abspath(folder))
    marks = [name for name in _FREESURFER_MARKS if (folder / name).is_file()]
    return folder.name == "mri" and len(marks) > 1


def _list(path: Path) -> Iterator[Scan]:
    table = AgeTable(path)
    if not table.has(FILE_COLUMNS):
        raise ScanError(
            f"the list {str(path)!r} has no column 'file' (it has: "
            f"{', '.join(list(table.columns.values())[:10]) or 'nothing'}); name one so"
        )
    if not any(table.cell(row, FILE_COLUMNS) for row in table.rows):
        raise ScanError(f"the list {str(path)!r} names no file; fill its column 'file'")
    for row in table.rows:
        if given := table.cell(row, FILE_COLUMNS):
            age, note = table.age(row)
            person = table.cell(row, ID_COLUMNS)
            file = path.parent / Path(given).expanduser()
            yield Scan(file, person, person or _person(file), age, note)


class _Tables:
    """Tables near scans, each read once."""

    def __init__(self) -> None:
        self._read: dict[Path, tuple[AgeTable | None, str]] = {}

    def scan(self, path: Path) -> Scan:
        """The scan of a file, with what the tables near it know; they never refuse it."""
        folder = Path(os.path.abspath(path)).parent
        places = (folder, *folder.parents[:3])
        person, session = _person(path), _session(path)
        # The person's own table before that of all people: it tells visits apart.
        sessions, note = self._near(places, f"{person}_sessions", "sessions", person)
        people, odd = self._near(places, "participants", "participants")
        said = None
        if sessions is not None and sessions.has_ages:
            said = sessions.age_of(person, session)
        if people is not None and people.age_of(person, session) is None:
            # Where files are called IXI013-HH-1212_T1w and people IXI013-HH-1212.
            stem = _stem(path.name)
            longer = [p for p in people.ids if re.match(re.escape(p) + r"(?![A-Za-z0-9])", stem)]
            person = max(longer, key=len, default=person)
        if said is None and people is not None:
            said = people.age_of(person, session)
        age, found = said or (None, "")
        notes = (found, note, odd if age is None else "")
        return Scan(path, "", person, age, " ".join(text for text in notes if text))

    def _near(
        self, places: Sequence[Path], name: str, sidecar: str, person: str = ""
    ) -> tuple[AgeTable | None, str]:
        """The nearest table of this name, and why it is of no use; units may be told above it."""
        for place in places:
            found = []
            for table in (place / f"{name}.tsv", place / f"{name}.csv"):
                if table not in self._read and table.is_file():
                    sidecars = [above / f"{sidecar}.json" for above in (place, *place.parents[:3])]
                    try:
                        self._read[table] = AgeTable(table, sidecars, person), ""
                    except ScanError as error:
                        self._read[table] = None, str(error)
                if table in self._read:
                    found.append(self._read[table])
            # Of two beside each other the one that has ages.
            for kept in found:
                if kept[0] is not None and kept[0].knows_ages:
                    return kept
            if found:
                return found[0]
        return None, ""


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
    return _subject(path) or _base(path)


def _subject(path: Path) -> str:
    """A FreeSurfer subject's name, that of its folder; "" if the file is of none."""
    return Path(os.path.abspath(path)).parts[-3] if _is_freesurfer(path.parent) else ""


def _session(path: Path) -> str:
    """The session as BIDS writes it into names, else ""."""
    for part in (path.name, *reversed(path.parent.parts)):
        if match := re.search(r"(?:^|_)(ses-[A-Za-z0-9]+)", part):
            return match[1]
    return ""


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
