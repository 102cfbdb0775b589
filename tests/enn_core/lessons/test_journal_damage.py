"""Bytes that change on the disk, logs that are lost: named, never used, never without a word."""

from __future__ import annotations

import contextlib
import json
import os
import shutil
import sqlite3
import stat
import warnings
from pathlib import Path

import numpy as np
import pytest
from journal_damage import IDENTITY, flipped, header, make, state

from enn_core.lessons import promise
from enn_core.lessons.errors import JournalCorrupt, JournalError
from enn_core.lessons.journal import Journal

FORMAT_1 = Path(__file__).parents[2] / "fixtures" / "journal-1"


def _change(file: Path, statement: str, *values: object) -> None:
    with contextlib.closing(sqlite3.connect(file)) as db, db:
        db.execute(statement, values)


def _teach(journal: Journal, subject: str = "new") -> int:
    with journal.writing() as writing:
        return writing.append("teach", subject, {}, {"c": np.ones(4, np.float16)}).seq


# --- flipped bits --------------------------------------------------------------------------------


def test_no_flipped_bit_is_used_without_a_word(tmp_path):
    """Teaching and undoing on damaged files: refused, or as if nothing had been damaged."""
    data = make(tmp_path / "good").read_bytes()
    with Journal.open(tmp_path / "good", identity=IDENTITY) as journal:
        want = state(journal)
    refused = []
    for seed in range(60):
        file = tmp_path / str(seed) / "j"
        file.parent.mkdir()
        file.write_bytes(flipped(data, seed))
        try:
            with Journal.open(file, identity=IDENTITY, create=False) as journal:
                new = _teach(journal)
                with journal.writing() as writing:
                    writing.deactivate([new, 2])
                    writing.activate([2])
                details, arrays, events = state(journal)
            assert (details, arrays, events[:-1]) == want, seed
        except JournalError as error:
            refused.append(str(error))
    assert len(refused) > 5
    assert not any("\n" in line for line in refused)


@pytest.mark.parametrize(
    ("column", "value"),
    [
        ("uid", "f" * 32),
        ("at", 1.0),
        ("kind", "refit"),
        ("subject", "another"),
        ("active", 0),
        ("covers", "[1,2]"),
        ("details", '{"good":[2]}'),
        ("layout", '[["c","float16",[12,2]]]'),
        ("data", bytes(48)),
        ("data", "text"),
        ("crc", 5),
        ("crc", "five"),
        ("seq", 99),
    ],
)
def test_a_changed_column_is_named_and_can_be_forgotten(tmp_path, column, value):
    file = make(tmp_path / "j")
    _change(file, f"UPDATE events SET {column} = ? WHERE seq = 3", value)
    seq = 99 if column == "seq" else 3
    with Journal.open(file, identity=IDENTITY) as journal:
        for active in (True, False, None):
            with pytest.raises(JournalCorrupt, match=f"entry {seq} is damaged") as caught:
                journal.events(active=active)
            assert "\n" not in str(caught.value)
        with journal.writing() as writing, pytest.raises(JournalCorrupt, match="is damaged"):
            writing.deactivate([3])
        with journal.writing() as writing, pytest.raises(JournalCorrupt, match="is damaged"):
            writing.events()
        events, damaged = journal.intact()
        assert [event.seq for event in events] == [1, 2, *range(4, 13)]
        assert {each.seq for each in damaged} == {seq, 3}
        assert journal.forget([each.seq for each in damaged]) == len(damaged)
        assert [event.seq for event in journal.events(active=None)] == [1, 2, *range(4, 13)]


def test_a_lost_row_is_named(tmp_path):
    file = make(tmp_path / "j")
    _change(file, "DELETE FROM events WHERE seq = 12")
    with Journal.open(file, identity=IDENTITY) as journal:
        with pytest.raises(JournalCorrupt, match=r"entry 12 is damaged \(it cannot be found"):
            journal.events()
        assert _teach(journal) == 13
        with pytest.raises(JournalCorrupt, match="entry 12 is damaged"):
            journal.events()
        journal.forget([12])
        assert len(journal.events(active=None)) == 12


@pytest.mark.parametrize("key", ["identity", "header", "header_layout", "header_data", "crc"])
def test_a_changed_description_is_told(tmp_path, key):
    file = make(tmp_path / "j")
    _change(file, "UPDATE meta SET value = replace(value, '4', '5') || '' WHERE key = ?", key)
    _change(file, "UPDATE meta SET value = value || ' ' WHERE key = ?", key)
    with (
        pytest.raises(JournalCorrupt, match="damaged"),
        Journal.open(file, identity=IDENTITY) as journal,
    ):
        journal.snapshot()


def test_a_changed_list_of_entries_is_told_and_all_can_be_forgotten(tmp_path):
    file = make(tmp_path / "j")
    _change(file, "UPDATE meta SET value = replace(value, '1-12', '1-13') WHERE key = 'entries'")
    with Journal.open(file, identity=IDENTITY) as journal:
        with pytest.raises(JournalCorrupt, match="list of entries is damaged"):
            journal.events()
        with pytest.raises(JournalCorrupt, match="list of entries is damaged"):
            _teach(journal)
        assert journal.forget() == 12
        assert _teach(journal) == 13
        assert len(journal.events()) == 1


# --- the log -------------------------------------------------------------------------------------


@pytest.mark.parametrize("harm", ["removed", "halved", "flipped"])
def test_what_was_acknowledged_is_in_the_file_itself(tmp_path, harm):
    """As after kill -9: copied while it is open, with what may have become of its log."""
    file = tmp_path / "a" / "j"
    with Journal.open(file, identity=IDENTITY, header=header) as journal:
        for number in (1, 2, 3):
            assert _teach(journal) == number
        copy = tmp_path / "b" / "j"
        copy.parent.mkdir()
        shutil.copy(file, copy)
        log = Path(f"{file}-wal").read_bytes()
        if harm != "removed":
            half = log[: len(log) // 2]
            Path(f"{copy}-wal").write_bytes(
                half if harm == "halved" or not log else flipped(log, 0)
            )
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        with Journal.open(copy, identity=IDENTITY, create=False) as again:
            assert [event.seq for event in again.events()] == [1, 2, 3]


def test_a_lost_log_is_announced_where_it_could_not_be_emptied(tmp_path):
    file = tmp_path / "a" / "j"
    copy = tmp_path / "b" / "j"
    copy.parent.mkdir()
    with Journal.open(file, identity=IDENTITY) as journal:
        _teach(journal)
        with Journal.open(file, identity=IDENTITY) as other:
            other._reader.db.execute("BEGIN")
            other._reader.db.execute("SELECT * FROM events").fetchall()
            assert [_teach(journal), _teach(journal)] == [2, 3]
            assert promise.read(file) == promise.Promise(4, 3)
            assert stat.S_IMODE(promise.promise_file(file).stat().st_mode) == 0o600
            for each in (file, promise.promise_file(file)):
                shutil.copy(each, copy.parent)
            other._reader.db.execute("COMMIT")
        with warnings.catch_warnings():
            warnings.simplefilter("error")
            Journal.open(file, identity=IDENTITY).close()  # nothing is lost here
        assert _teach(journal) == 4
        assert promise.read(file) is None
    with pytest.warns(UserWarning, match=r"lost its newest entries, 2 to 3: .* backup") as told:
        journal = Journal.open(copy, identity=IDENTITY)
    with journal:
        assert [event.seq for event in journal.events()] == [1]
        assert "\n" not in str(told[0].message)
        assert _teach(journal) == 2  # it goes on, and says it no more
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        Journal.open(copy, identity=IDENTITY).close()


@pytest.mark.parametrize(
    "content", [b"", b"{", b"[]", b'{"generation": 9, "last": 9, "sha256": ""}']
)
def test_a_damaged_promise_stops_nobody(tmp_path, content):
    file = make(tmp_path / "j")
    promise.promise_file(file).write_bytes(content)
    with Journal.open(file, identity=IDENTITY) as journal:
        assert _teach(journal) == 13
    assert not promise.promise_file(file).exists()


# --- copies --------------------------------------------------------------------------------------


def test_a_backup_is_the_journal_of_that_moment(tmp_path):
    file, copy = make(tmp_path / "j"), tmp_path / "copy.sqlite"
    copy.write_text("an older one")
    with Journal.open(file, identity=IDENTITY) as journal:
        want = state(journal)
        with journal.writing() as writing:
            writing.append("teach", "not yet committed", {})
            journal.backup(copy)
        assert os.name == "nt" or stat.S_IMODE(copy.stat().st_mode) == 0o600
        for own in (file, Path(f"{file}-wal"), Path(f"{file}.reserve")):
            with pytest.raises(JournalError, match="the profile itself"):
                journal.backup(own)
        with pytest.raises(JournalError, match="choose a place") as caught:
            journal.backup(tmp_path / "missing" / "copy.sqlite")
        assert "\n" not in str(caught.value)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["copy.sqlite", "j", "j.reserve"]
    with Journal.open(copy, identity=IDENTITY, create=False) as again:
        assert state(again) == want


# --- the format before ---------------------------------------------------------------------------


def test_a_journal_of_format_1_is_read_as_it_was_and_goes_on(tmp_path):
    shutil.copy(FORMAT_1 / "search.sqlite", tmp_path / "search.sqlite")
    identity = {"app": "search", "weights": "ab" * 32, "dim": 4}
    expected = json.loads((FORMAT_1 / "expected.json").read_text("utf-8"))
    for _ in range(2):
        with Journal.open(tmp_path / "search.sqlite", identity=identity) as journal:
            read = [
                [
                    *(e.seq, e.uid, e.at, e.kind, e.subject, e.details),
                    {name: values.tolist() for name, values in e.arrays.items()},
                    *(list(e.covers), e.active),
                ]
                for e in journal.events(active=None)
            ]
            assert read == expected
            np.testing.assert_array_equal(journal.header[1]["anchors"], np.eye(4))
    with Journal.open(tmp_path / "search.sqlite", identity=identity) as journal:
        assert _teach(journal) == 7
        _change(tmp_path / "search.sqlite", "UPDATE events SET subject = 'x' WHERE seq = 1")
        with pytest.raises(JournalCorrupt, match="entry 1 is damaged"):
            journal.events()
