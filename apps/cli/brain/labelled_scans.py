"""Scans of known age for training, evaluation and calibration, from files or from a table."""

from __future__ import annotations

import csv
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from apps.cli.brain.group import prepare
from apps.cli.terminal import CommandError, counted, note, printable, quote

if TYPE_CHECKING:
    import numpy as np

    from neuro.scans.batch import Outcome
    from neuro.scans.find import Scan
    from neuro.scans.preprocess import InputKind, Prepared

__all__ = ["Labelled", "find_table", "labelled_scans", "prepare_labelled", "read_table"]


@dataclass
class Labelled:
    """Predicted and known ages.

    Attributes:
        names: of the scans.
        predicted, ages: (n,) years.
        sites: of the scans; "" where it is not told.
        lows, highs: ends of the intervals; NaN where there are none.
        by_head: (members, heads) years of each scan, if a model has looked at them.
        unmirrored: the same without the mirror image, if that was asked for.
        flags: what is odd about each scan; empty if they come from a table.
    """

    names: list[str]
    predicted: np.ndarray
    ages: np.ndarray
    sites: list[str]
    lows: np.ndarray
    highs: np.ndarray
    by_head: np.ndarray | None = None
    unmirrored: np.ndarray | None = None
    flags: Sequence[str] = ()


def find_table(inputs: Sequence[Path], column: str) -> Path | None:
    """The one table of predicted ages among the inputs; None if they are scans.

    Raises:
        CommandError: a table of predicted ages and something else.
    """
    tables = [path for path in inputs if column in (_header(path) or ())]
    if not tables:
        return None
    if len(inputs) > 1:
        raise CommandError(f"{quote(tables[0])} is a table of predicted ages; give it alone")
    return tables[0]


def read_table(path: Path, column: str) -> Labelled:
    """Rows of a table that have both ages, without those of refused scans (`--any-scan`).

    Raises:
        CommandError: it has no column age, or no such row.
    """
    import numpy as np

    header = _header(path) or []
    if "age" not in header:
        raise CommandError(f"{quote(path)} has no column age; known ages are needed")
    rows, refused = [], 0
    with path.open(newline="", encoding="utf-8-sig") as file:
        for row in csv.DictReader(file, delimiter=_delimiter(path)):
            predicted, age = _number(row.get(column)), _number(row.get("age"))
            if not (math.isfinite(predicted) and math.isfinite(age)):
                continue
            if (row.get("flags") or "").startswith("refused: "):
                refused += 1
            else:
                rows.append((row, predicted, age))
    if refused:
        note(f"left out: {counted(refused, 'row')} of refused scans, whose ages may mean nothing")
    if not rows:
        raise CommandError(f"{quote(path)} has no row with both age and {column}")
    ends = {
        name: np.array([_number(row.get(name)) for row, _, _ in rows])
        for name in ("interval_low", "interval_high")
    }
    return Labelled(
        names=[row.get("participant_id") or row.get("file") or "" for row, _, _ in rows],
        predicted=np.array([predicted for _, predicted, _ in rows]),
        ages=np.array([age for _, _, age in rows]),
        sites=[(row.get("site") or "").strip() for row, _, _ in rows],
        lows=ends["interval_low"],
        highs=ends["interval_high"],
    )


def labelled_scans(inputs: Sequence[Path], *, one_each: bool = False) -> list[Scan]:
    """Scans whose ages are known.

    Args:
        inputs: files, folders, BIDS roots, lists.
        one_each: the first of each participant alone: the same person may not be learnt from and
            tested on.

    Raises:
        CommandError: no age is known.
    """
    from neuro.scans.find import find_scans

    found = find_scans(inputs)
    known = [scan for scan in found if scan.age is not None]
    for scan in found:
        if scan.age is None and scan.note:
            note(f"{quote(scan.path)}: {printable(scan.note)}")
    if not known:
        raise CommandError(
            f"no age is known of {counted(len(found), 'scan')}; give a participants.tsv with "
            "participant_id and age, or a list with the columns file and age"
        )
    if len(known) < len(found):
        note(f"left out: {counted(len(found) - len(known), 'scan')} without a known age")
    if not one_each:
        return known
    first: dict[str, Scan] = {}
    for scan in known:
        first.setdefault(scan.participant_id, scan)
    if len(first) < len(known):
        further = len(known) - len(first)
        note(f"left out: {counted(further, 'further scan')} of people who have one already")
    return list(first.values())


def prepare_labelled(
    scans: Sequence[Scan],
    kind: InputKind,
    *,
    jobs: int,
    cache: Path | None,
    stage: str,
    use: Callable[[Scan, Prepared], str | None],
) -> list[dict[str, Any]]:
    """Prepare scans and use those that nothing speaks against.

    Args:
        scans, kind, jobs, cache, stage: see `apps.cli.brain.group.prepare`.
        use: called with each of them, as soon as it is prepared; says why it cannot be used after
            all, if so.

    Returns:
        `file` and `error` of those that were left out.

    Raises:
        CommandError: none is left.
    """
    from neuro.scans.quality import judge

    def each(outcome: Outcome) -> dict[str, Any]:
        error = outcome.error
        if outcome.prepared is not None:
            flags = judge(outcome.prepared.quality, image=outcome.prepared.image)
            error = next((flag.text for flag in flags if flag.fatal), "")
            error = error or use(outcome.scan, outcome.prepared) or ""
        return {"file": str(outcome.scan.path), "flags": "", "error": error}

    rows = prepare(scans, kind, jobs=jobs, cache=cache, stage=stage, each=each)
    failed = [{"file": row["file"], "error": row["error"]} for row in rows if row["error"]]
    if len(failed) == len(rows):
        raise CommandError(
            f"none of {counted(len(rows), 'scan')} can be used; the first: "
            f"{printable(failed[0]['error'])}"
        )
    return failed


def _header(path: Path) -> list[str] | None:
    """Columns of a table; None if it is none."""
    if path.suffix.lower() not in (".csv", ".tsv") or not path.is_file():
        return None
    try:
        with path.open(newline="", encoding="utf-8-sig") as file:
            return [name.strip() for name in next(csv.reader(file, delimiter=_delimiter(path)), [])]
    except (UnicodeDecodeError, csv.Error):
        return None


def _delimiter(path: Path) -> str:
    return "\t" if path.suffix.lower() == ".tsv" else ","


def _number(text: str | None) -> float:
    try:
        return float(text or "nan")
    except ValueError:
        return math.nan
