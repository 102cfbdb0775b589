"""The journal: what is written is there, by whomever, and what is forgotten is not."""

from __future__ import annotations

import contextlib
import multiprocessing
import os
import random
import signal
import sqlite3
import stat
import tempfile
import threading
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from enn_core.lessons import journal as journal_module
from enn_core.lessons.errors import (
    JournalBusy,
    JournalCorrupt,
    JournalError,
    JournalMismatch,
    JournalMissing,
)
from enn_core.lessons.events import Event, latest
from enn_core.lessons.journal import Journal

IDENTITY = {"weights": "0123abcd", "dim": 4}
posix = pytest.mark.skipif(os.name == "nt", reason="modes, limits and fork the POSIX way")


@pytest.fixture
def journal(tmp_path):
    with Journal.open(tmp_path / "search.sqlite", identity=IDENTITY) as opened:
        yield opened


def _teach(journal: Journal, subject: str, covers=(), **details) -> Event:
    with journal.writing() as writing:
        return writing.append("teach", subject, details, {"c": np.ones(4, np.float16)}, covers)


def _one_line(caught) -> str:
    message = str(caught.value)
    assert message
    assert "\n" not in message
    return message


def _contents(folder: Path) -> bytes:
    # Drops this process's locks on the files (see `Journal`): only where no other one uses them.
    return b"".join(file.read_bytes() for file in sorted(folder.rglob("*")) if file.is_file())


# --- events --------------------------------------------------------------------------------------


def test_events_survive_closing(tmp_path) -> None:
    path = tmp_path / "people" / "me" / "search.sqlite"
    arrays = {
        "c": np.float16([1, 0, 0, 0.5]),
        "marked": np.arange(12, dtype=">f4").reshape(3, 4)[::2],
        "none": np.empty((0, 4), np.float32),
    }
    with Journal.open(path, identity=IDENTITY) as journal:
        before = journal.version
        with journal.writing() as writing:
            written = writing.append(
                "teach", "a dog \N{DOG}", {"good": (1, 2), 3: "\ud800"}, arrays
            )
        assert journal.version > before
        assert written.seq == 1
        assert written.covers == (1,)
    with Journal.open(path, identity=IDENTITY, create=False) as journal:
        (read,) = journal.events()
    for event in (written, read):
        assert (event.uid, event.at, event.subject) == (written.uid, written.at, "a dog \N{DOG}")
        assert event.details == {"good": [1, 2], "3": "\ud800"}
        assert event.active
        assert sorted(event.arrays) == sorted(arrays)
        for name, values in arrays.items():
            assert event.arrays[name].dtype == values.dtype.newbyteorder("=")
            np.testing.assert_array_equal(event.arrays[name], values)
            with pytest.raises(ValueError, match="read-only"):
                event.arrays[name][...] = 0


def test_undo_is_a_switch_and_numbers_are_never_used_twice(journal) -> None:
    for subject in ("a", "b", "a"):
        _teach(journal, subject)
    with journal.writing() as writing:
        assert writing.deactivate([3, 2, 99]) == 2
        assert writing.deactivate([3]) == 0
        assert [event.seq for event in writing.events()] == [1]
    assert [event.seq for event in journal.events(active=False)] == [2, 3]
    with journal.writing() as writing:
        assert writing.activate(iter([2])) == 1
    assert [event.seq for event in journal.events()] == [1, 2]
    assert journal.forget([2, 3]) == 2
    assert journal.forget([]) == 0
    assert _teach(journal, "c").seq == 4
    assert journal.forget() == 2
    assert _teach(journal, "c").seq == 5


def test_what_fails_changes_nothing(journal) -> None:
    before = journal.version
    for error in (KeyError("mine"), OSError("mine"), sqlite3.OperationalError("mine")):
        with pytest.raises(type(error), match="mine"), journal.writing() as writing:  # noqa: PT012
            writing.append("teach", "a", {})
            raise error
    with pytest.raises(ValueError, match="kind"), journal.writing() as writing:  # noqa: PT012
        writing.append("teach", "a", {})
        writing.append("Teach!", "a", {})
    assert journal.events(active=None) == []
    with journal.writing() as writing:
        writing.events()
    assert journal.version == before
    with pytest.raises(JournalError, match="over"):
        writing.append("teach", "a", {})


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"kind": "two words"}, "kind"),
        ({"kind": 3}, "kind"),
        ({"subject": None}, "subject"),
        ({"subject": "x" * 20_001}, "20,000"),
        ({"subject": "half \ud83d"}, "surrogate"),
        ({"details": [1]}, "JSON object"),
        ({"details": {"a": float("nan")}}, "JSON"),
        ({"details": {"a": {1, 2}}}, "JSON"),
        ({"details": {"a": "x" * 2_000_000}}, "2,000,000"),
        ({"details": {"a": [[[[[[[[[[[[[[[[[]]]]]]]]]]]]]]]]]}}, "16 levels"),
        ({"arrays": {"c": np.ones(4)}}, "float16 or float32"),
        ({"arrays": {"c": np.array(["a"])}}, "float16 or float32"),
        ({"arrays": {"c": np.float32([1, np.inf, 0, 0])}}, "NaN or infinity"),
        ({"arrays": {"c": np.ones(5, np.float32)}}, "the last of 4"),
        ({"arrays": {"c": np.float32(1)}}, "1 to 4 axes"),
        ({"arrays": {"c": np.ones((1, 1, 1, 1, 4), np.float32)}}, "1 to 4 axes"),
        ({"arrays": {"C c": np.ones(4, np.float32)}}, "names"),
        ({"arrays": {f"c{i}": np.ones(4, np.float32) for i in range(9)}}, "at most 8"),
        ({"arrays": {"c": np.zeros((2**21 + 1, 4), np.float32)}}, "33,554,432"),
        ({"uid": "1234"}, "32 hex"),
        ({"at": -1}, "1970"),
        ({"at": float("nan")}, "1970"),
        ({"at": 1e12}, "1970"),
    ],
)
def test_limits(journal, arguments, message) -> None:
    given = {"kind": "teach", "subject": "a", "details": {}, "arrays": {}} | arguments
    with pytest.raises(ValueError, match=message) as caught, journal.writing() as writing:
        writing.append(**given)
    _one_line(caught)
    assert journal.events(active=None) == []


def test_header_is_made_once(tmp_path) -> None:
    calls = []

    def header():
        calls.append(1)
        return {"rule": None}, {"anchors": np.eye(4, dtype=np.float32)}

    for rule in (None, "adapter"):
        with Journal.open(tmp_path / "j", identity=IDENTITY, header=header) as journal:
            details, arrays = journal.header
            assert details == {"rule": rule}
            np.testing.assert_array_equal(arrays["anchors"], np.eye(4))
            with journal.writing() as writing:
                writing.set_header({"rule": "adapter"})
    assert len(calls) == 1

    def fails():
        raise OSError("mine")

    for header in (fails, lambda: ({"a": 1}, {})):  # a failure leaves a file that is then finished
        with contextlib.ExitStack() as stack:
            if header is fails:
                stack.enter_context(pytest.raises(OSError, match=r"^mine$"))
            with Journal.open(tmp_path / "k", identity=IDENTITY, header=header) as journal:
                assert journal.header == ({"a": 1}, {})


# --- what stands for a subject -------------------------------------------------------------------


def test_latest() -> None:
    def event(seq, kind, subject, covers, active=True):
        return Event(seq, f"{seq:032x}", 0.0, kind, subject, {}, {}, tuple(covers), active)

    a1, b2 = event(1, "teach", "a", [1]), event(2, "teach", "b", [2])
    a3, a4 = event(3, "teach", "a", [1, 3]), event(4, "teach", "a", [1, 3, 4])
    assert latest([]) == {}
    assert latest([b2, a4, a3, a1]) == {"a": a4, "b": b2}
    assert list(latest([b2, a1])) == ["a", "b"]
    off = event(4, "teach", "a", [1, 3, 4], active=False)
    assert latest([a1, b2, a3, off])["a"] is a3  # undo of the newest: what stood before
    middle = event(3, "teach", "a", [1, 3], active=False)
    assert latest([a1, b2, middle, a4]) == {"b": b2}  # nothing was computed from 1 and 4 yet
    refit = event(5, "refit", "a", [1, 4])
    assert latest([a1, b2, middle, a4, refit]) == {"a": refit, "b": b2}
    assert latest([a1, b2, a3, a4, refit])["a"] is a4  # taken back: the bits from before
    assert latest([refit]) == {}


@settings(max_examples=60)
@given(data=st.data())
def test_latest_equals_the_state_before_an_undo(data, tmp_path_factory) -> None:
    """Whatever is taught and undone in last-in-first-out order, each undo restores the state."""
    folder = tmp_path_factory.mktemp("latest")
    with Journal.open(folder / "j", identity=IDENTITY) as journal:
        states, done = [{}], []
        for _ in range(data.draw(st.integers(0, 8))):
            if done and data.draw(st.booleans()):
                with journal.writing() as writing:
                    writing.deactivate([done.pop()])
                states.pop()
            else:
                subject = data.draw(st.sampled_from("abc"))
                active = [e.seq for e in journal.events() if e.subject == subject]
                done.append(_teach(journal, subject, active).seq)
                states.append({s: e.uid for s, e in latest(journal.events()).items()})
            now = {s: e.uid for s, e in latest(journal.events()).items()}
            assert (now, list(now)) == (states[-1], list(states[-1]))


# --- the file ------------------------------------------------------------------------------------


@posix
def test_only_the_owner_may_read(tmp_path) -> None:
    before = os.umask(0)
    try:
        with Journal.open(tmp_path / "a" / "b" / "j", identity=IDENTITY) as journal:
            _teach(journal, "a")
            for file in (tmp_path / "a" / "b").iterdir():
                assert stat.S_IMODE(file.stat().st_mode) == 0o600, file
    finally:
        os.umask(before)
    assert stat.S_IMODE((tmp_path / "a").stat().st_mode) == 0o700
    assert stat.S_IMODE((tmp_path / "a" / "b").stat().st_mode) == 0o700


def test_writes_reach_the_disk(journal) -> None:
    for db in (journal._reader.db, journal._writer):
        assert db.execute("PRAGMA journal_mode").fetchone() == ("wal",)
        assert db.execute("PRAGMA synchronous").fetchone() == (2,)


def test_a_journal_of_something_else_is_refused(tmp_path) -> None:
    path = tmp_path / "j"
    Journal.open(path, identity=IDENTITY).close()
    for other in (
        {"weights": "ffff", "dim": 4},
        {"weights": "0123abcd"},
        IDENTITY | {"x": "y" * 999},
    ):
        with pytest.raises(JournalMismatch, match="belongs to something else") as caught:
            Journal.open(path, identity=other)
        assert len(_one_line(caught)) < 400 + len(str(path))
    with pytest.raises(ValueError, match="JSON"):
        Journal.open(path, identity={"a": object()})


def test_a_missing_journal_is_not_made_unasked(tmp_path) -> None:
    path = tmp_path / "folder" / "j"
    with pytest.raises(FileNotFoundError, match="nothing has been taught") as caught:
        Journal.open(path, identity=IDENTITY, create=False)
    assert isinstance(caught.value, JournalMissing)
    _one_line(caught)
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("state", ["empty", "no tables", "log of a killed process"])
def test_a_half_made_file_is_finished(tmp_path, state) -> None:
    path = tmp_path / "j"
    path.touch()
    if state != "empty":
        with contextlib.closing(sqlite3.connect(path)) as db:
            db.execute("PRAGMA journal_mode = WAL")
    if state == "log of a killed process":
        with contextlib.closing(sqlite3.connect(path, isolation_level=None)) as db:
            db.execute("BEGIN IMMEDIATE")
            db.execute("CREATE TABLE meta (key TEXT PRIMARY KEY, value)")
            log = Path(f"{path}-wal").read_bytes()
        Path(f"{path}-wal").write_bytes(log)
    with pytest.raises(JournalMissing):
        Journal.open(path, identity=IDENTITY, create=False)
    with Journal.open(path, identity=IDENTITY, header=lambda: ({"rule": 1}, {})) as journal:
        assert journal.header[0] == {"rule": 1}
        assert _teach(journal, "a").seq == 1


def _foreign(path: Path) -> None:
    with contextlib.closing(sqlite3.connect(path)) as db:
        db.execute("CREATE TABLE photos (id)")


def _future(path: Path) -> None:
    Journal.open(path, identity=IDENTITY).close()
    with contextlib.closing(sqlite3.connect(path)) as db:
        db.execute("PRAGMA user_version = 99")


def _torn(path: Path) -> None:
    with Journal.open(path, identity=IDENTITY) as journal:
        for i in range(50):
            _teach(journal, f"subject {i}")
    data = bytearray(path.read_bytes())
    data[4096:] = bytes(len(data) - 4096)
    path.write_bytes(data)


def _cut(path: Path) -> None:
    _torn(path)
    os.truncate(path, 5000)


def _bad(column: str, value: object):
    table, _, name = column.partition(".")

    def make(path: Path) -> None:
        with Journal.open(path, identity=IDENTITY) as journal:
            _teach(journal, "a")
        with contextlib.closing(sqlite3.connect(path)) as db, db:
            db.execute(f"UPDATE {table} SET {name} = ?", (value,))

    return make


@pytest.mark.parametrize(
    "damage",
    [
        lambda path: path.write_text("a shopping list, long enough to be read as a header " * 99),
        _foreign,
        _future,
        _torn,
        _cut,
        _bad("events.details", "{"),
        _bad("events.layout", '[["c", "float16", [5]]]'),
        _bad("events.layout", '[["c", "float16", [3]]]'),
        _bad("events.layout", '[["c", "object", [1]]]'),
        _bad("events.data", b""),
        _bad("events.covers", "7"),
        _bad("meta.value", "x"),
        _bad("meta.value", None),
    ],
)
def test_damage_is_named(tmp_path, damage) -> None:
    path = tmp_path / "j"
    damage(path)
    with (  # noqa: PT012
        pytest.raises(JournalError) as caught,
        Journal.open(path, identity=IDENTITY) as journal,
    ):
        journal.events(active=None)
        journal.snapshot()
    _one_line(caught)
    if damage is not _future:
        assert isinstance(caught.value, JournalCorrupt)


@posix
def test_a_folder_that_cannot_be_written() -> None:
    """In a child that is nobody, for root may write anywhere."""
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name) / "locked"
        Journal.open(folder / "old", identity=IDENTITY).close()
        for path, mode in ((folder / "old", 0o444), (folder, 0o555), (folder.parent, 0o755)):
            path.chmod(mode)
        process = _PROCESSES.Process(target=_as_nobody, args=(folder,))
        process.start()
        process.join(60)
        assert process.exitcode == 0


def _as_nobody(folder: Path) -> None:
    if os.getuid() == 0:
        os.setgid(65534)
        os.setuid(65534)
    for path in (folder / "new", folder / "deeper" / "new", folder / "old" / "new"):
        with pytest.raises(JournalError) as caught:
            Journal.open(path, identity=IDENTITY)
        _one_line(caught)
    with pytest.raises(JournalError) as caught:
        _teach(Journal.open(folder / "old", identity=IDENTITY), "a")
    _one_line(caught)


@posix
def test_a_full_disk_loses_nothing(tmp_path) -> None:
    path = tmp_path / "j"
    process = _PROCESSES.Process(target=_fill, args=(path,))
    process.start()
    process.join(60)
    assert process.exitcode == 0
    with Journal.open(path, identity=IDENTITY) as journal:
        stored = [event.seq for event in journal.events()]
        assert stored == list(range(1, len(stored) + 1))
        assert len(stored) > 3
        assert _teach(journal, "more").seq == len(stored) + 1


def _fill(path: Path) -> None:
    import resource

    signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    resource.setrlimit(resource.RLIMIT_FSIZE, (200_000, 200_000))
    journal = Journal.open(path, identity=IDENTITY)
    acknowledged = 0
    with pytest.raises(JournalError, match="nothing was changed") as caught:  # noqa: PT012
        while True:
            _teach(journal, "x" * 3000)
            acknowledged += 1
    _one_line(caught)
    assert len(journal.events()) == acknowledged


# --- several at once -----------------------------------------------------------------------------

_PROCESSES = multiprocessing.get_context("spawn" if os.name == "nt" else "forkserver")
if os.name != "nt":
    _PROCESSES.set_forkserver_preload(["enn_core.feedback", "pytest"])


def _count(path: Path, times: int) -> None:
    """Read and write in one go; a writer in between would make two events of the same number."""
    with Journal.open(path, identity=IDENTITY) as journal:
        for _ in range(times):
            with journal.writing() as writing:
                n = len(writing.events())
                writing.append("teach", "count", {"n": n, "pid": os.getpid()})


def test_two_processes_take_turns(tmp_path) -> None:
    path = tmp_path / "folder" / "j"  # that neither finds: both make it at once
    processes = [_PROCESSES.Process(target=_count, args=(path, 60)) for _ in range(2)]
    for process in processes:
        process.start()
    for process in processes:
        process.join(120)
        assert process.exitcode == 0
    with Journal.open(path, identity=IDENTITY) as journal:
        events = journal.events()
    assert [event.details["n"] for event in events] == list(range(120))
    assert len({event.details["pid"] for event in events}) == 2


def test_threads_of_one_journal_take_turns_too(journal) -> None:
    def work() -> None:
        for _ in range(10):
            with journal.writing() as writing:
                writing.append("teach", "count", {"n": len(writing.events())})
            assert journal.version > 1
            assert journal.events()

    threads = [threading.Thread(target=work) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert [event.details["n"] for event in journal.events()] == list(range(40))


def test_threads_that_all_make_it(tmp_path) -> None:
    opened = []
    threads = [
        threading.Thread(
            target=lambda: opened.append(Journal.open(tmp_path / "a" / "j", identity=IDENTITY))
        )
        for _ in range(6)
    ]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(opened) == 6
    for journal in opened:
        _teach(journal, "a")
    assert [len(journal.events()) for journal in opened] == [6] * 6
    for journal in opened:
        journal.close()


def test_each_sees_what_the_other_wrote(tmp_path, monkeypatch) -> None:
    path = tmp_path / "j"
    first, second = (Journal.open(path, identity=IDENTITY) for _ in range(2))
    with first, second:
        version = second.version
        _teach(first, "a")
        assert second.version > version
        version = first.version
        with second.writing() as writing:
            writing.deactivate([1])
        assert first.version > version
        assert first.events() == []
        monkeypatch.setattr(journal_module, "_BUSY_SECONDS", 0.05)
        with first.writing() as writing:
            writing.append("teach", "b", {})
            assert second.events() == []  # a reader does not wait
            other = Journal.open(path, identity=IDENTITY)
            with other, pytest.raises(JournalBusy, match="try again") as caught, other.writing():
                pass
            _one_line(caught)
            with pytest.raises(JournalBusy), first.writing():  # by another thread, say
                pass
        assert len(second.events()) == 1


@posix
def test_a_file_deleted_meanwhile_is_noticed(journal) -> None:
    """Otherwise what is acknowledged would go to a file without a name."""
    _teach(journal, "a")
    os.unlink(journal.path)
    with pytest.raises(JournalError, match="open it again") as caught:
        _teach(journal, "b")
    _one_line(caught)
    with Journal.open(journal.path, identity=IDENTITY), pytest.raises(JournalError):
        _teach(journal, "b")


# --- forgetting ----------------------------------------------------------------------------------


def _secret(writing, name: str, size: int) -> dict[str, bytes]:
    """An event with marks to look for in the files, spread over many pages if it is large."""
    rows = np.full((size, 4), float(int.from_bytes(name.encode()[-2:])), np.float32)
    rows[:] = np.frombuffer(f"{name:_<16}".encode(), np.float32)
    writing.append("teach", f"subject-{name}", {"note": f"detail-{name}" * size}, {"m": rows})
    return {
        "subject": f"subject-{name}".encode(),
        "details": f"detail-{name}".encode(),
        "array": f"{name:_<16}".encode(),
    }


@settings(max_examples=15)
@given(
    sizes=st.lists(st.integers(1, 900), min_size=1, max_size=12),
    data=st.data(),
)
def test_nothing_forgotten_stays_in_the_files(sizes, data, tmp_path_factory) -> None:
    folder = tmp_path_factory.mktemp("forget")
    identity = {"dim": 4}
    with (
        Journal.open(folder / "j", identity=identity) as journal,
        Journal.open(folder / "j", identity=identity) as other,
    ):
        marks = []
        for i, size in enumerate(sizes):
            with journal.writing() as writing:
                marks.append(_secret(writing, f"q{i:03d}x", size))
            other.events()
        with other.writing() as writing:
            writing.deactivate([1])
        for value in marks[-1].values():
            assert value in _contents(folder)
        gone = data.draw(st.sets(st.integers(1, len(sizes))))
        assert journal.forget(gone) == len(gone)
        content = _contents(folder)
        for seq, parts in enumerate(marks, 1):
            for name, value in parts.items():
                assert (value in content) == (seq not in gone), (seq, name)
        assert len(other.events(active=None)) == len(sizes) - len(gone)
        assert other.forget() == len(sizes) - len(gone)
        content = _contents(folder)
        assert not any(value in content for parts in marks for value in parts.values())


@pytest.mark.parametrize("seed", [0, 1, 10])
def test_nothing_stays_of_rows_that_moved_before_they_were_forgotten(seed, tmp_path) -> None:
    """Pages are merged as they empty; with these seeds SQLite alone left copies of moved rows."""
    rng = random.Random(seed)
    with Journal.open(tmp_path / "j", identity={}) as journal:
        names = {seq: f"mark-{seq - 1:03d}-end" for seq in range(1, 41)}
        with journal.writing() as writing:
            for name in names.values():
                writing.append("teach", name, {"x": "y" * rng.randint(0, 1500)})
        left = set(names)
        while left:
            gone = rng.sample(sorted(left), 4)
            left -= set(gone)
            journal.forget(gone)
            content = _contents(tmp_path)
            assert {seq for seq, name in names.items() if name.encode() in content} == left


def test_forgetting_that_was_killed_is_finished(journal, monkeypatch) -> None:
    with journal.writing() as writing:
        marks = _secret(writing, "secret", 500)
        _secret(writing, "kept", 5)
    monkeypatch.setattr(Journal, "_erase_bytes", lambda *_: None)
    journal.forget([1])
    monkeypatch.undo()
    assert marks["details"] in _contents(journal.path.parent)
    with Journal.open(journal.path, identity=IDENTITY) as other:
        content = _contents(journal.path.parent)
        assert not any(value in content for value in marks.values())
        assert b"subject-kept" in content
        assert len(other.events()) == 1


def test_bytes_that_another_process_still_reads(journal, monkeypatch) -> None:
    with journal.writing() as writing:
        marks = _secret(writing, "secret", 5)
    monkeypatch.setattr(journal_module, "_BUSY_SECONDS", 0.05)
    with Journal.open(journal.path, identity=IDENTITY) as other:
        journal._reader.db.execute("BEGIN")
        journal._reader.db.execute("SELECT * FROM events").fetchall()
        with pytest.raises(JournalBusy, match="forget again") as caught:
            other.forget()
        _one_line(caught)
        assert other.events() == []
        journal._reader.db.execute("COMMIT")
        assert other.forget() == 0
        assert not any(value in _contents(journal.path.parent) for value in marks.values())
