"""What is damaged is found, all of it; what is whole is saved, and nothing else."""

from __future__ import annotations

import contextlib
import doctest
import random
import sqlite3
import stat
from pathlib import Path

import pytest
from journal_damage import IDENTITY, flipped, make, state, zeroed

from enn_core.files.digests import Damage
from enn_core.lessons import check
from enn_core.lessons.check import check_journal, repair_journal
from enn_core.lessons.errors import JournalCorrupt, JournalError
from enn_core.lessons.events import COLUMNS
from enn_core.lessons.journal import Journal
from enn_core.lessons.salvage import salvage

V0_1 = Path(__file__).parents[2] / "fixtures" / "v0.1" / "profiles" / "local"


def test_the_example_runs():
    assert doctest.testmod(check).failed == 0


def _opens_as(file: Path, want: tuple) -> bool:
    try:
        with Journal.open(file, identity=IDENTITY, create=False) as journal:
            return state(journal) == want
    except JournalError:
        return False


def test_all_that_is_damaged_is_found_and_the_rest_is_saved(tmp_path):
    good = make(tmp_path / "good", 40, 40)
    assert check_journal(good) == repair_journal(good) == []
    data = good.read_bytes()
    with Journal.open(good, identity=IDENTITY) as journal:
        want = state(journal)
    harmed = [flipped(data, seed) for seed in range(25)]
    harmed += [zeroed(data, page) for page in range(len(data) // 4096)]
    saved = []
    for number, content in enumerate(harmed):
        file = tmp_path / str(number) / "j"
        file.parent.mkdir()
        file.write_bytes(content)
        found = check_journal(file)
        assert file.read_bytes() == content
        assert [path.name for path in file.parent.iterdir()] == ["j"]
        assert all(isinstance(each, Damage) and "\n" not in each.lost for each in found)
        assert all(each.file == str(file) and each.remedy and not each.repaired for each in found)
        if not found:
            assert _opens_as(file, want)
            continue
        told = repair_journal(file)
        assert {each.part for each in told} == {each.part for each in found}
        if not all(each.repaired for each in told):
            assert file.read_bytes() == content
            continue
        assert check_journal(file) == []
        copy = file.with_name("j.damaged-1")
        assert copy.read_bytes() == content
        assert stat.S_IMODE(copy.stat().st_mode) == stat.S_IMODE(file.stat().st_mode) == 0o600
        with Journal.open(file, identity=IDENTITY, create=False) as journal:
            events = state(journal)[2]
            assert all(event in want[2] for event in events)
            saved.append(len(events))
            lost = {each.part for each in told if each.part.startswith("entry ")}
            gone = {f"entry {seq}" for seq in range(1, 41)} - {f"entry {e[0]}" for e in events}
            assert lost == gone
            with journal.writing() as writing:
                assert writing.append("teach", "new", {}).seq == 41
            journal.forget([41])
        assert not copy.exists()  # it may hold what is forgotten
    assert len(saved) > 10
    assert sum(saved) / len(saved) > 30


@pytest.mark.parametrize("rows", [1, 300, 3000])
def test_pages_are_read_without_those_that_point_to_them(tmp_path, rows):
    """Rows on one page and on many, as SQLite reads them."""
    file = make(tmp_path / "j", 12, rows)
    with Journal.open(file, identity=IDENTITY) as journal, journal._reading() as db:
        there = {row[0]: row for row in db.execute(f"SELECT {COLUMNS} FROM events")}
        described = dict(db.execute("SELECT key, value FROM meta WHERE key != 'crc'"))
    assert salvage(file.read_bytes()) == (there, described)
    data = zeroed(file.read_bytes(), 0)
    file.write_bytes(data)
    with pytest.raises(JournalCorrupt):
        Journal.open(file, identity=IDENTITY)
    assert [each.repaired for each in repair_journal(file)] == [True]
    with Journal.open(file, identity=IDENTITY) as journal:
        assert len(journal.events(active=None)) == 12
        assert [event.seq for event in journal.events(active=False)] == [4]


@pytest.mark.parametrize("seed", range(40))
def test_salvage_takes_nothing_that_was_never_there(tmp_path, seed):
    file = make(tmp_path / "j", 6, 200)
    want, _ = salvage(file.read_bytes())
    rng = random.Random(seed)
    data = bytearray(file.read_bytes())
    for _ in range(300):
        data[rng.randrange(len(data))] = rng.randrange(256)
    found, _ = salvage(bytes(data))
    assert all(want[seq] == row for seq, row in found.items())


def test_a_lost_header_is_no_lost_profile(tmp_path):
    file = make(tmp_path / "j")
    with contextlib.closing(sqlite3.connect(file)) as db, db:
        db.execute("UPDATE meta SET value = zeroblob(8) WHERE key = 'header_data'")
    assert [each.part for each in check_journal(file)] == ["header data"]
    assert [each.repaired for each in repair_journal(file)] == [True]
    with Journal.open(file, identity=IDENTITY) as journal:
        assert journal.header == ({"rule": 1, "lost": True}, {})
        assert len(journal.events(active=None)) == 12


def test_whose_it_is_cannot_be_made_up(tmp_path):
    file = make(tmp_path / "j")
    with contextlib.closing(sqlite3.connect(file)) as db, db:
        db.execute("UPDATE meta SET value = '{}' WHERE key = 'identity'")
    content = file.read_bytes()
    (told,) = repair_journal(file)
    assert (told.part, told.repaired) == ("identity", False)
    assert "backup" in told.remedy
    assert file.read_bytes() == content


def test_a_lost_log_is_told_and_settled(tmp_path):
    from enn_core.lessons import promise

    file = make(tmp_path / "j")
    with Journal.open(file, identity=IDENTITY) as journal:
        promise.keep(file, journal._writer, 1)
    behind = make(tmp_path / "k", 10)
    promise.promise_file(file).rename(promise.promise_file(behind))
    (told,) = check_journal(behind)
    assert (told.part, "11 to 12" in told.lost) == ("log", True)
    assert [each.repaired for each in repair_journal(behind)] == [True]
    assert check_journal(behind) == []


@pytest.mark.parametrize("name", ["me/search-6c86fa51eed6cbf7", "site/brain-a4f336caa5e27a10"])
def test_a_journal_of_0_1_is_checked_and_not_changed(tmp_path, name):
    file = tmp_path / "j"
    file.write_bytes((V0_1 / f"{name}.sqlite").read_bytes())
    assert check_journal(file) == repair_journal(file) == []
    assert [path.name for path in tmp_path.iterdir()] == ["j"]


@pytest.mark.parametrize("content", [None, b"", b"no journal " * 999])
def test_what_is_no_journal(tmp_path, content):
    file = tmp_path / "j"
    if content is not None:
        file.write_bytes(content)
    (told,) = check_journal(file)
    assert told.part == ""
    assert "\n" not in told.lost + told.remedy
    assert repair_journal(file) == [told]
