"""A made-up next format of the SQLite files, and processes that end in the middle of making it."""

from __future__ import annotations

import multiprocessing
import os
import re
import shutil
import signal
import sqlite3
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import closing, contextmanager
from pathlib import Path
from typing import Any

import pytest

from enn_core.files.migrations import Content, Tables

_PROCESSES = multiprocessing.get_context("forkserver")
_PROCESSES.set_forkserver_preload(["enn_core.feedback", "retrieval.index.writer", "pytest"])


def next_format(table: str, today: Tables | None = None) -> Tables:
    """Rows get a note, 20 kB each; what there is gets one that tells how often it got one."""
    before = today.steps if today is not None else ()

    def step(db: sqlite3.Connection) -> None:
        db.execute(f"ALTER TABLE {table} ADD COLUMN note TEXT NOT NULL DEFAULT ''")
        db.execute(f"UPDATE {table} SET note = note || 'noted' || hex(zeroblob(10000))")

    return Tables(*before, step)


def notes(file: Path, table: str) -> list[tuple]:
    """The notes of a file's rows, in short; [] if it is of an old format and nothing else."""
    with closing(sqlite3.connect(f"file:{file}?mode=rw", uri=True)) as db:
        assert db.execute("PRAGMA integrity_check").fetchone() == ("ok",)
        columns = [row[1] for row in db.execute(f"PRAGMA table_info({table})")]
        record = db.execute("SELECT key FROM meta WHERE key LIKE 'format %' ORDER BY key")
        steps = [key for (key,) in record]
        number = db.execute("PRAGMA user_version").fetchone()[0] or 1
        if "note" not in columns:
            assert steps == [f"format {each}" for each in range(2, number + 1)]
            return []
        assert steps == [f"format {each}" for each in range(2, number + 1)]
        return db.execute(f"SELECT substr(note, 1, 12) FROM {table}").fetchall()


_ADDED = ("note", "changed", "former", "crc")


def rows(file: Path, table: str) -> list[tuple]:
    """All rows of a file, without what formats after the first add to them."""
    with closing(sqlite3.connect(f"file:{file}?mode=rw", uri=True)) as db:
        found = db.execute(f"SELECT * FROM {table} ORDER BY 1")
        kept = [i for i, column in enumerate(found.description) if column[0] not in _ADDED]
        return [tuple(row[i] for i in kept) for row in found]


def run(work: Callable[..., None], *args: Any) -> int:
    """Run it in a process of its own; its exit code, negative for a signal."""
    process = start(work, *args)
    process.join(60)
    code = process.exitcode
    assert code is not None
    return code


def start(work: Callable[..., None], *args: Any) -> Any:
    process = _PROCESSES.Process(target=work, args=args)
    process.start()
    return process


def die_at(instant: int) -> None:
    """Kill this process before its nth statement of SQLite or call of the system, or after that.

    Killed between two of these, it would leave what it leaves at one of them.
    """
    left = [instant]

    def tick(*_: object) -> None:
        left[0] -= 1
        if left[0] == 0:
            os.kill(os.getpid(), signal.SIGKILL)

    def around(function: Callable) -> Callable:
        def wrapped(*args, **options):
            tick()
            result = function(*args, **options)
            tick()
            return result

        return wrapped

    for name in ("replace", "fsync", "open"):
        setattr(os, name, around(getattr(os, name)))
    connect = sqlite3.connect

    def traced(*args, **options):
        db = connect(*args, **options)
        db.set_trace_callback(tick)
        return db

    sqlite3.connect = traced  # type: ignore[assignment]


@contextmanager
def shown_to_all(folder: Path) -> Iterator[Path]:
    """A copy of a folder that everybody may read and nobody may write.

    Not below pytest's own folder, which every new run of the same user closes to others.
    """
    with tempfile.TemporaryDirectory() as place:
        copy = Path(place) / folder.name
        shutil.copytree(folder, copy)
        for path in [*copy.rglob("*"), copy]:
            path.chmod(0o555 if path.is_dir() else 0o444)
        Path(place).chmod(0o755)
        yield copy


def copy_of(file: Path) -> Path:
    """What was there before."""
    return file.with_name(f"{file.name}.format-1")


def kill_at_any_instant(
    work: Callable[..., None], file: Path, table: str, *args: Any, stride: int = 1
) -> None:
    """Whenever the process is killed, the file is of one format or the other, and the next goes on.

    Args:
        work: opens the file by a program of `next_format`; called with file and args.
        file: of today's format; alone in its folder but for files that `work` does not change.
        table: that gets notes.
        stride: instants from one kill to the next.
    """
    before, others = rows(file, table), {path.name for path in file.parent.iterdir()}
    copy = copy_of(file)
    contents = {path: path.read_bytes() for path in file.parent.iterdir()}
    seen = [0, 0]
    for instant in range(1, 300, stride):
        for path in file.parent.iterdir():
            path.unlink()
        for path, content in contents.items():
            path.write_bytes(content)
        code = run(until, instant, work, file, *args)
        if code == 0:
            break
        assert code == -signal.SIGKILL
        done = bool(notes(file, table))
        seen[done] += 1
        assert rows(file, table) == before
        assert run(work, file, *args) == 0
        assert notes(file, table) == [("noted0000000",)] * len(before)
        assert (rows(file, table), rows(copy, table), notes(copy, table)) == (before, before, [])
        left = {path.name for path in file.parent.iterdir()} - {"write.lock"}
        assert left == {*others, copy.name}
    assert code == 0
    assert seen[False] > 15 // stride
    assert seen[True] > 0


# --- what the processes do -----------------------------------------------------------------------


def open_journal(file: Path, owner: dict) -> None:
    """By a program whose journals have another format."""
    from enn_core.lessons import journal, journal_file

    journal_file.FORMAT = next_format("events", journal_file.FORMAT)
    journal.Journal.open(file, identity=owner).close()


def teach_journal(file: Path, owner: dict) -> None:
    """By the same program: what is there is read, and one lesson more is taught."""
    from enn_core.lessons import journal, journal_file

    journal_file.FORMAT = next_format("events", journal_file.FORMAT)
    with journal.Journal.open(file, identity=owner) as opened:
        if len(opened.events(active=None)) != 3:
            raise SystemExit("not all is read")
        with opened.writing() as writing:
            writing.append("teach", "more", {})


def open_index(file: Path, _: Any = None) -> None:
    """Open the index of a catalog for writing, by a program whose catalogs have another format."""
    from retrieval.index import catalog, manifest
    from retrieval.index.writer import Writer

    catalog.FORMAT = next_format("images", catalog.FORMAT)
    manifest.FORMAT = Content(*manifest.FORMAT.steps, lambda content: content)
    with Writer(file.parent, manifest.Manifest.read(file.parent)):
        pass


def until(instant: int, work: Callable[..., None], *args: Any) -> None:
    """Do it, and be killed."""
    die_at(instant)
    work(*args)


def slowly(work: Callable[..., None], *args: Any) -> None:
    """Do it, with half a second between the steps and their end."""
    connect = sqlite3.connect

    def trace(statement: str) -> None:
        if statement.startswith("INSERT INTO meta VALUES ('format"):
            time.sleep(0.5)

    def traced(*given, **options):
        db = connect(*given, **options)
        db.set_trace_callback(trace)
        return db

    sqlite3.connect = traced  # type: ignore[assignment]
    work(*args)


def within(limit: int, line: str, work: Callable[..., None], *args: Any) -> None:
    """Do it where no file can grow beyond a limit, and be told so in one line."""
    import resource

    signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    resource.setrlimit(resource.RLIMIT_FSIZE, (limit, limit))
    refused(line, work, *args)


def as_nobody(line: str, work: Callable[..., None], *args: Any) -> None:
    """Do it without the right to write, and be told so in one line."""
    nobody()
    refused(line, work, *args)


def nobody() -> None:
    """Lose the rights of the superuser, whom no mode of a file stops."""
    import email.parser  # noqa: F401  (nobody may be kept from reading modules)

    from retrieval.index import writer  # noqa: F401

    if os.geteuid() == 0:
        os.setgid(65534)
        os.setuid(65534)


def refused(line: str, work: Callable[..., None], *args: Any) -> None:
    with pytest.raises((RuntimeError, OSError)) as caught:
        work(*args)
    assert re.search(line, str(caught.value)), caught.value
    assert "\n" not in str(caught.value)
