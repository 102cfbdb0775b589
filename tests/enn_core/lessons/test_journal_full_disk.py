"""A full disk: what was taught is read, and forgetting makes room."""

from __future__ import annotations

import errno
import os
import shutil
import stat
from pathlib import Path

import numpy as np
import pytest
from migration_cases import run, until
from small_disk import fill, is_full, small_disk

from enn_core.files import sqlite
from enn_core.lessons import journal_file
from enn_core.lessons.errors import JournalError, JournalMissing
from enn_core.lessons.journal import Journal
from enn_core.lessons.reserve import SIZE, reserve_file

IDENTITY = {"dim": 4}


@pytest.fixture
def disk(tmp_path):
    with small_disk(tmp_path / "disk", 8) as place:
        yield place


def _taught(disk: Path, rows: int = 40) -> Path:
    file = disk / "me.sqlite"
    with Journal.open(file, identity=IDENTITY) as journal:
        for i in range(6):
            with journal.writing() as writing:
                values = np.full((rows, 4), i, np.float32)
                writing.append("teach", f"subject-{i}", {"note": f"secret-{i}"}, {"c": values})
    return file


def _teach(journal: Journal) -> None:
    with journal.writing() as writing:
        writing.append("teach", "more", {})


def _bytes(disk: Path) -> bytes:
    return b"".join(p.read_bytes() for p in disk.glob("me.sqlite*"))


def test_what_was_taught_is_read_and_exported(disk, tmp_path):
    file = _taught(disk)
    filler = fill(disk)
    with Journal.open(file, identity=IDENTITY) as journal:
        assert is_full(disk)
        assert [event.seq for event in journal.events()] == [1, 2, 3, 4, 5, 6]
        version = journal.version
        assert journal.export(tmp_path / "lessons.json") == 6
        journal.backup(tmp_path / "copy.sqlite")
        for _ in range(2):
            with pytest.raises(JournalError, match="the disk is full") as caught:
                _teach(journal)
            assert "\n" not in str(caught.value)
        filler.unlink()
        _teach(journal)  # goes on as soon as there is room
        assert journal.version > version
        assert len(journal.events()) == 7
    with Journal.open(tmp_path / "copy.sqlite", identity=IDENTITY) as copy:
        assert len(copy.events()) == 6


def test_a_new_journal_is_not_taken_for_a_missing_one(disk):
    fill(disk)
    with pytest.raises(JournalError, match=r"disk is full|No space") as caught:
        Journal.open(disk / "new.sqlite", identity=IDENTITY)
    assert not isinstance(caught.value, JournalMissing)
    (disk / "filler").unlink()
    with Journal.open(disk / "new.sqlite", identity=IDENTITY) as journal:
        _teach(journal)


def test_what_lies_in_a_log_is_read_too(tmp_path, monkeypatch):
    """Of a process that was killed, where nobody can write: from a copy, which goes."""
    file, copy = _taught(tmp_path), tmp_path / "copy" / "me.sqlite"
    copy.parent.mkdir()
    with Journal.open(file, identity=IDENTITY) as journal, journal._reading() as db:
        db.execute("BEGIN")
        db.execute("SELECT * FROM events").fetchall()
        _teach(journal)
        for end in ("", "-wal"):
            shutil.copy(f"{file}{end}", f"{copy}{end}")
        db.execute("COMMIT")
    places = tmp_path / "tmp"
    places.mkdir()

    def hindered(*_: object, **__: object):
        raise JournalError("cannot be written")

    monkeypatch.setattr(journal_file, "open_both", hindered)
    monkeypatch.setattr(journal_file.tempfile, "tempdir", str(places))
    with Journal.open(copy, identity=IDENTITY) as journal:
        assert [event.seq for event in journal.events()] == [1, 2, 3, 4, 5, 6, 7]
        assert len(list(places.iterdir())) == 1
        with pytest.raises(JournalError, match="cannot be written"):
            _teach(journal)
    assert list(places.iterdir()) == []


def test_one_that_was_open_goes_on_reading(disk):
    file = _taught(disk)
    with Journal.open(file, identity=IDENTITY) as journal:
        fill(disk)
        with pytest.raises(JournalError, match="the disk is full"):  # noqa: PT012
            for _ in range(99):
                _teach(journal)
        assert len(journal.events()) >= 6


def test_what_others_write_is_seen_where_it_can_only_be_read(disk, tmp_path):
    file = _taught(disk)
    filler = fill(disk)
    with Journal.open(file, identity=IDENTITY) as reader:
        version = reader.version
        filler.unlink()
        with Journal.open(file, identity=IDENTITY) as other:
            _teach(other)
        assert reader.version > version
        assert len(reader.events()) == 7


@pytest.mark.parametrize("forgotten", [[2], [1, 2, 3, 4, 5, 6], None])
def test_forgetting_uses_the_reserve(disk, forgotten):
    file = _taught(disk, 3000)
    reserve = reserve_file(file)
    assert stat.S_IMODE(reserve.stat().st_mode) == 0o600
    assert reserve.stat().st_size == SIZE
    filler = fill(disk)
    before = file.stat().st_size
    gone = range(6) if forgotten is None else [seq - 1 for seq in forgotten]
    with Journal.open(file, identity=IDENTITY) as journal:
        assert journal.forget(forgotten) == len(gone)
        assert len(journal.events()) == 6 - len(gone)
    assert file.stat().st_size < before
    content = _bytes(disk)
    assert [i for i in range(6) if f"secret-{i}".encode() in content] == [
        i for i in range(6) if i not in gone
    ]
    filler.unlink()
    with Journal.open(file, identity=IDENTITY) as journal:
        _teach(journal)
    assert reserve.exists()


def test_what_cannot_be_forgotten_for_lack_of_room_is_said(disk):
    file = _taught(disk, 20_000)  # what stays is more than the reserve
    fill(disk)
    with Journal.open(file, identity=IDENTITY) as journal:
        with pytest.raises(JournalError, match=r"MB.* forget again") as caught:
            journal.forget([1])
        assert "\n" not in str(caught.value)
        assert [event.seq for event in journal.events()] == [2, 3, 4, 5, 6]
        (disk / "filler").unlink()
        assert journal.forget([]) == 0
    assert b"secret-0" not in _bytes(disk)


def test_a_small_file_can_be_forgotten_without_a_reserve(disk):
    file = _taught(disk)
    reserve_file(file).unlink()
    fill(disk)
    with Journal.open(file, identity=IDENTITY) as journal:
        with pytest.raises(JournalError, match=r"the disk is full.*free some space") as caught:
            journal.forget([1])
        assert "\n" not in str(caught.value)
        assert len(journal.events()) == 6


def test_forgetting_on_a_full_disk_killed_at_any_instant(disk):
    """Something is forgotten altogether or not at all, and the next one to open it ends it."""
    contents = None
    codes = []
    for instant in [*range(1, 40, 3), *range(40, 400, 12)]:
        for path in disk.iterdir():
            path.unlink()
        if contents is None:
            _taught(disk, 300)
            contents = {path: path.read_bytes() for path in disk.iterdir()}
        for path, content in contents.items():
            path.write_bytes(content)
        filler = fill(disk)
        codes.append(run(until, instant, _forget, disk / "me.sqlite"))
        filler.unlink()
        with Journal.open(disk / "me.sqlite", identity=IDENTITY) as journal:
            held = [event.seq for event in journal.events()]
        assert held in ([1, 2, 3, 4, 5, 6], [1, 3, 4, 5, 6])
        assert (b"secret-1" in _bytes(disk)) == (2 in held)
        if codes[-1] == 0:
            assert 2 not in held
            break
    assert codes[-1] == 0
    assert len(codes) > 10


def _forget(file: Path) -> None:
    with Journal.open(file, identity=IDENTITY) as journal:
        journal.forget([2])


def test_a_quota_gets_its_own_words():
    assert sqlite.no_room(OSError(errno.EDQUOT, "x")) == "your quota is used up"
    assert sqlite.no_room(OSError(errno.ENOSPC, "x")) == "the disk is full"
    assert sqlite.no_room(OSError(errno.EACCES, "x")) is None


def test_a_quota_is_told_where_sqlite_tells_an_error_of_the_disk(tmp_path, monkeypatch):
    def used_up(*_: object, **__: object):
        raise OSError(errno.EDQUOT, os.strerror(errno.EDQUOT))

    file = _taught(tmp_path)
    file.chmod(0o444)
    with Journal.open(file, identity=IDENTITY) as journal:
        monkeypatch.setattr(sqlite.tempfile, "TemporaryFile", used_up)
        journal._writer.execute("PRAGMA query_only = ON")  # any error will do
        with pytest.raises(JournalError, match="your quota is used up"):
            _teach(journal)
